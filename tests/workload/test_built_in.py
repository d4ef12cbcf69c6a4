"""The built-in texts are enough for two quick exams with prompts of their own."""

from __future__ import annotations

import pytest

from autotune.validate.tiers import SIZES
from autotune.workload.texts import TEXTS


@pytest.mark.fault("B45")
def test_there_is_text_for_tuning_and_for_confirming():
    assert len(set(TEXTS)) == len(TEXTS) == 48
    assert len(TEXTS) >= 2 * SIZES["quick"].prompts


def test_every_text_is_long_enough_to_be_cut():
    assert min(len(text) for text in TEXTS) > 300
    assert max(len(text.split()) for text in TEXTS) <= 130


def test_texts_are_of_many_kinds():
    assert sum("\n" in text for text in TEXTS) >= 5  # code and tables
    assert sum(not text.isascii() for text in TEXTS) >= 3  # other languages
