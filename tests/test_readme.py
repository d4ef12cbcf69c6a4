"""The README does what it says: its code runs, its result is that of the benchmarks, and its links lead somewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from autotune.model import route
from tests import documents

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

README = documents.read("README.md")


@pytest.mark.slow
def test_the_code_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert f'name = "{documents.MODEL}"' in README
    names = documents.run("README.md", monkeypatch, tmp_path, tokenizer)
    assert not route.is_routed(names["model"])
    assert names["answer"].shape[1] > 1


def test_the_result_is_that_of_the_benchmarks() -> None:
    assert documents.marked(README, "result") == documents.marked(documents.read("docs/benchmarks.md"), "result")


def test_it_says_how_to_run_it_first() -> None:
    commands = documents.section(README, "Run it")
    assert "make demo" in commands
    assert "make test" in commands
    assert README.index("## Result") < README.index("## Run it") < README.index("```python")


def test_it_is_short() -> None:
    assert README.count("\n") <= 140
