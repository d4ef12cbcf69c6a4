"""Fixtures shared by all tests. Nothing here or below writes into the user's own cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny random Llama with tied embeddings, of this test's own."""
    return models.tiny("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return models.tiny_tokenizer()
