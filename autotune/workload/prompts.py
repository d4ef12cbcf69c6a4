"""Prompts as token ids, from a caller's text, ids, tensors or files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from ..errors import WorkloadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


EXPECTED = "strings (with a tokenizer), lists of token ids, 1-D or 2-D tensors, an autotune.Workload or a file's path"


def parse(value: Any, tokenizer: PreTrainedTokenizerBase | None) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of each prompt. Whether a model can take them is not checked here.

    Args:
        value: see `workload.read`.
        tokenizer: needed for text.

    Raises:
        WorkloadError: a prompt is wrong; the message says which, what was expected and what to do.
    """
    if isinstance(value, (str, Path)):
        value = _read_file(Path(value))
    if isinstance(value, torch.Tensor):
        value = [value]
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise WorkloadError(f"a workload of type {type(value).__name__} was given; expected {EXPECTED}")
    items = list(value)
    if items and all(is_count(item) for item in items):
        raise WorkloadError(
            "the workload is one flat list of token ids; a list of prompts was expected: put it in a list"
        )
    rows: list[tuple[int, ...]] = []
    for item in items:
        where = f"prompt {len(rows)}"
        if isinstance(item, str):
            rows.append(_tokenize(item, tokenizer, where))
        elif isinstance(item, torch.Tensor):
            rows.extend(_tensor_rows(item, where))
        elif isinstance(item, Sequence) and not isinstance(item, bytes):
            rows.append(_ids(item, where))
        else:
            raise WorkloadError(f"{where} is of type {type(item).__name__}; expected {EXPECTED}")
    return tuple(rows)


def is_count(item: object) -> TypeGuard[int]:
    """Whether `item` is a whole number. NumPy's integers are; True and False are not."""
    return isinstance(item, Integral) and not isinstance(item, bool)


def _ids(item: Sequence[Any], where: str) -> tuple[int, ...]:
    for position, token in enumerate(item):
        if not is_count(token):
            raise WorkloadError(
                f"{where} has a {type(token).__name__} at position {position}; token ids (int) were expected"
            )
    return tuple(map(int, item))


def _tensor_rows(item: torch.Tensor, where: str) -> list[tuple[int, ...]]:
    if item.dim() not in (1, 2):
        raise WorkloadError(f"{where} is a {item.dim()}-D tensor; [tokens] or [prompts, tokens] was expected")
    if item.dtype == torch.bool or item.is_floating_point() or item.is_complex():
        raise WorkloadError(f"{where} is a {item.dtype} tensor; token ids (an integer dtype) were expected")
    rows = item.tolist() if item.dim() == 2 else [item.tolist()]
    return [tuple(row) for row in rows]


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase | None, where: str) -> tuple[int, ...]:
    if tokenizer is None:
        raise WorkloadError(f"{where} is text, which needs a tokenizer: pass tokenizer=..., or give token ids")
    try:
        ids = tokenizer(text)["input_ids"]
    except (TypeError, ValueError, UnicodeError) as error:  # e.g. a lone surrogate
        raise WorkloadError(f"the tokenizer refuses {where} ({error}); valid Unicode text was expected") from error
    return _ids(ids, where)


def _read_file(path: Path) -> list[Any]:
    hint = "for prompts given as text pass a list of strings"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() also splits at U+2028
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise WorkloadError(
            f"the workload {str(path)[:200]!r} cannot be read as a text file ({error}); {hint}"
        ) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    kind = path.suffix.lower()
    if kind == ".json":
        expected = 'expected .jsonl, an object with the key "prompt" in each line, or a text file'
        raise WorkloadError(f"the workload {path} is JSON; {expected}")
    if kind != ".jsonl":
        return [line for _, line in numbered]
    return [_record(line, f"{path}, line {number}") for number, line in numbered]


def _record(line: str, where: str) -> Any:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f'{where} is not JSON ({error}); an object with the key "prompt" was expected') from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), (str, list)):
        raise WorkloadError(f'{where} has no "prompt" of text or token ids; expected {{"prompt": "..."}}')
    return record["prompt"]
