"""Workloads: what is accepted, what is refused with which words, shapes, splits, and observing calls."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from autotune import workload
from autotune.errors import WorkloadError
from autotune.workload import OBSERVED_PROMPTS, Bucket, Observer, Workload
from tests import models

if TYPE_CHECKING:
    from pathlib import Path

IDS = ((5, 6, 7), (8, 9))


@pytest.mark.parametrize(
    "value",
    [
        [[5, 6, 7], [8, 9]],
        ((5, 6, 7), (8, 9)),
        [torch.tensor([5, 6, 7]), torch.tensor([8, 9], dtype=torch.int32)],
        [torch.tensor([[5, 6, 7]]), [8, 9]],
        iter([[5, 6, 7], [8, 9]]),
        [np.array([5, 6, 7]).tolist(), list(np.array([8, 9]))],
        Workload(IDS),
        Workload([[5, 6, 7], [8, 9]]),
    ],
    ids=["lists", "tuples", "tensors", "mixed", "iterator", "numpy", "workload", "workload of lists"],
)
def test_token_ids_are_read(value: Any) -> None:
    assert workload.read(value, model=models.tiny()).prompts == IDS


def test_a_matrix_is_a_prompt_a_row() -> None:
    assert workload.read(torch.tensor([[1, 2], [3, 4]]).T).prompts == ((1, 3), (2, 4))


@pytest.mark.parametrize(
    ("said", "context"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 64}, 64),
        ({"max_position_embeddings": -1}, None),  # XLNet: there is no limit
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_the_context_that_a_configuration_states(said: dict[str, Any], context: int | None) -> None:
    assert workload.context_of(SimpleNamespace(**said)) == context


def test_text_is_tokenized(tokenizer: Any) -> None:
    texts = ["Once upon", "naïve 👩‍👩‍👧 \x00"]
    read = workload.read(texts, tokenizer=tokenizer, model=models.tiny())
    assert read.prompts == tuple(tuple(tokenizer(text)["input_ids"]) for text in texts)


def test_files_are_read(tmp_path: Path, tokenizer: Any) -> None:
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_bytes(b"\xef\xbb\xbfone\r\n\n two\n")
    lines.write_text('{"prompt": "one", "id": 3}\n\n{"prompt": [4, 5]}\n{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert workload.read(text, tokenizer=tokenizer) == workload.read(["one", " two"], tokenizer=tokenizer)
    from_lines = workload.read(str(lines), tokenizer=tokenizer)
    assert workload.read(lines.rename(tmp_path / "PROMPTS.JSONL"), tokenizer=tokenizer) == from_lines
    (tmp_path / "prompts.json").write_text('[{"prompt": "one"}]', encoding="utf-8")
    with pytest.raises(WorkloadError, match=r"expected .jsonl, an object with the key"):
        workload.read(tmp_path / "prompts.json", tokenizer=tokenizer)
    assert from_lines == workload.read(["one", [4, 5], "a\u2028b"], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("value", "options", "says"),
    [
        ([], {}, "is empty; at least one prompt"),
        ([[5], []], {}, "prompt 1 is empty"),
        (torch.zeros(0, 4, dtype=torch.long), {}, "is empty"),
        ([torch.zeros(2, 0, dtype=torch.long)], {}, "prompt 0 is empty"),
        ([[5, -1]], {}, "prompt 0 has token id -1"),
        ([[5], [models.VOCABULARY]], {}, f"prompt 1 has token id {models.VOCABULARY}.*below {models.VOCABULARY}"),
        ([[5, True]], {}, "prompt 0 has a bool at position 1"),
        ([[5, 6.0]], {}, "prompt 0 has a float at position 1"),
        ([[[5]]], {}, "prompt 0 has a list at position 0"),
        ([5, 6], {}, "one flat list of token ids"),
        (["text"], {}, "prompt 0 is text, which needs a tokenizer"),
        ([b"bytes"], {}, "prompt 0 is of type bytes"),
        ({"prompt": [5]}, {}, "of type dict was given"),
        (BatchEncoding({"input_ids": [[5]]}), {}, "of type BatchEncoding was given"),
        (None, {}, "of type NoneType was given"),
        ([torch.tensor([0.5])], {}, "prompt 0 is a torch.float32 tensor"),
        ([torch.tensor([True])], {}, "prompt 0 is a torch.bool tensor"),
        ([torch.zeros(1, 1, 2, dtype=torch.long)], {}, "prompt 0 is a 3-D tensor"),
        ([torch.tensor(5)], {}, "prompt 0 is a 0-D tensor"),
        ([[5] * 200, [5] * 250], {"new_tokens": 7}, "prompt 1 has 250 tokens, which leaves no room for 7.*is 256"),
        ([[5] * 256], {}, "prompt 0 has 256 tokens"),
        ([[5]], {"new_tokens": 0}, "new_tokens is 0"),
        ([[5]], {"new_tokens": 2.5}, "new_tokens is 2.5"),
        ([[5]], {"new_tokens": True}, "new_tokens is True"),
        ([[5]], {"batch_sizes": ()}, r"batch_sizes is \[\]"),
        ([[5]], {"batch_sizes": 0}, "batch_sizes is 0"),
        ([[5]], {"batch_sizes": "8"}, "batch_sizes is '8'"),
        ([[5]], {"batch_sizes": (1, -2)}, r"batch_sizes is \[1, -2\]"),
        (Workload(()), {}, "is empty"),
        (Workload(((5, 999),)), {}, "prompt 0 has token id 999"),
        (Workload((("a",),)), {}, "prompt 0 has a str"),
        (Workload(None), {}, "NoneType was given"),
        (Workload(IDS, new_tokens=0), {}, "new_tokens is 0"),
        (Workload(IDS, batch_sizes=()), {}, "batch_sizes is"),
        ("no such file", {}, "'no such file' cannot be read as a text file .* pass a list of strings"),
        ("nul\0", {}, "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused(value: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        workload.read(value, model=models.tiny(), **options)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00", "cannot be read as a text file"),
        (b'{"prompt": ', "line 1 is not JSON"),
        (b'\n{"text": "x"}', 'line 2 has no "prompt"'),
        (b'"prompt"', 'line 1 has no "prompt"'),
        (b'{"prompt": 3}', 'line 1 has no "prompt"'),
        (b'{"prompt": ' + b"[" * 100_000, "line 1 is not JSON"),
        (b'{"prompt": ["a"]}', "prompt 0 has a str"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(WorkloadError, match=says):
        workload.read(path)


def test_text_that_is_not_unicode_is_refused(tokenizer: Any) -> None:
    with pytest.raises(WorkloadError, match=r"refuses prompt 1 .*valid Unicode"):
        workload.read(["fine", "\ud800"], tokenizer=tokenizer)


@pytest.mark.parametrize(("length", "expected"), [(10, 64), (192, 64), (200, 56), (255, 1)])
def test_by_default_new_tokens_fit_the_context(length: int, expected: int) -> None:
    assert workload.read([[5] * length], model=models.tiny()).new_tokens == expected


def test_a_prompt_that_just_fits_is_accepted() -> None:
    assert workload.read([[5] * 250], model=models.tiny(), new_tokens=6).new_tokens == 6


def test_a_model_without_a_context_limit_accepts_any_length() -> None:
    assert len(workload.read([[5] * 5000], model=models.tiny("mamba")).prompts[0]) == 5000


@pytest.mark.fault("C49")
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_architecture_checks_ids(name: str) -> None:
    model = models.tiny(name)
    assert workload.read([[255]], model=model)
    with pytest.raises(WorkloadError, match="token id 256"):
        workload.read([[256]], model=model)


def test_options_override_a_workloads_own() -> None:
    given = Workload(IDS, new_tokens=9, batch_sizes=(4, 1, 4))
    assert workload.read(given) == Workload(IDS, 9, (1, 4))
    assert workload.read(given, new_tokens=3, batch_sizes=[2]) == Workload(IDS, 3, (2,))
    assert workload.read(given, batch_sizes=8).batch_sizes == (8,)


@pytest.mark.parametrize(
    ("lengths", "batches", "expected"),
    [
        ((10, 10, 12), (1,), [(1, 10)]),
        ((10, 20), (1,), [(1, 20)]),
        ((10, 11, 22), (1, 8), [(1, 11), (8, 11)]),
        ((10, 11, 23), (1, 8), [(1, 11), (1, 23), (8, 11), (8, 23)]),
    ],
)
def test_buckets(lengths: tuple[int, ...], batches: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    work = Workload(tuple((5,) * n for n in lengths), new_tokens=16, batch_sizes=batches)
    assert work.buckets() == tuple(Bucket(b, length, 16) for b, length in expected)


@pytest.mark.parametrize(("count", "holdout", "held"), [(2, 0.25, 1), (16, 0.25, 4), (10, 0.5, 5), (3, 0.99, 2)])
def test_split_parts_the_prompts(count: int, holdout: float, held: int) -> None:
    work = Workload(tuple(map(tuple, models.token_prompts(count))), new_tokens=3, batch_sizes=(2,))
    tune, held_out = work.split(holdout, seed=1)
    assert len(held_out.prompts) == held
    assert sorted(tune.prompts + held_out.prompts) == sorted(work.prompts)
    assert (tune, held_out) == work.split(holdout, seed=1)
    assert replace(tune, prompts=work.prompts) == work


def test_split_holds_out_short_and_long_prompts_alike() -> None:
    work = Workload(tuple((5, i) * (1 + 9 * (i % 2)) for i in range(40)))
    for seed in range(20):
        lengths = [len(p) for p in work.split(0.25, seed)[1].prompts]
        assert lengths.count(2) == lengths.count(20) == 5


@pytest.mark.fault("B45")
def test_split_keeps_equal_prompts_on_one_side() -> None:
    work = Workload(IDS * 10)
    tune, held_out = work.split()
    assert not set(tune.prompts) & set(held_out.prompts)
    assert len(tune.prompts) == len(held_out.prompts) == 10


def test_one_distinct_prompt_cannot_be_split() -> None:
    work = Workload(((5, 6),) * 3)
    assert work.split() == (work, work)


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.5])
def test_split_refuses_a_share_that_leaves_a_side_empty(holdout: float) -> None:
    with pytest.raises(WorkloadError, match="holdout"):
        Workload(IDS).split(holdout)


BASE = Workload(((5,) * 64,) * 4, new_tokens=64)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Workload(((9,) * 64,) * 8, new_tokens=64), True),
        (Workload(((5,) * 60, (5,) * 70), new_tokens=60), True),
        (Workload(((5,) * 128,) * 4, new_tokens=64), False),
        (Workload(((5,) * 64,) * 3 + ((5,) * 256,), new_tokens=64), False),
        (Workload(BASE.prompts, new_tokens=256), False),
        (Workload(BASE.prompts, new_tokens=64, batch_sizes=(1, 4)), False),
    ],
    ids=["other words", "similar lengths", "longer", "one much longer", "more new tokens", "another batch"],
)
def test_shape_key(other: Workload, same: bool) -> None:
    assert (other.shape_key() == BASE.shape_key()) is same


def test_shape_key_is_the_same_in_every_process() -> None:
    assert BASE.shape_key() == "88841551d1cd285d"


def test_observer_drops_padding_and_takes_medians() -> None:
    padded = models.left_padded((9, 5, 12))
    observer = Observer()
    observer.observe(padded["input_ids"], padded["attention_mask"], 8)
    observer.observe(torch.tensor([[7, 8]]), None, 20)
    observer.observe(torch.tensor([[7, 9]]), torch.ones(1, 2), 20)
    work = observer.workload()
    assert [len(p) for p in work.prompts] == [9, 5, 12, 2, 2]
    assert models.PAD not in work.prompts[1]
    assert (work.new_tokens, work.batch_sizes) == (20, (1, 3))


def test_observer_is_ready_after_enough_usable_calls() -> None:
    observer, ids = Observer(context=16), torch.tensor([[7, 8]])
    assert not observer.ready(0)
    for unusable in (
        (torch.zeros(1, 0, dtype=torch.long), None, 5),  # inputs_embeds were given
        (torch.zeros(0, 3, dtype=torch.long), None, 5),
        (ids, None, 0),
        (ids, torch.ones(1, 1, 2, 2), 5),
        (ids[0], None, 5),
        (torch.full((1, 16), 7), None, 5),  # the context is full
    ):
        observer.observe(*unusable)
    assert not observer.ready(1)
    observer.observe(ids, None, 5)
    assert observer.ready(1)
    assert not observer.ready(2)


def test_observer_without_a_usable_prompt_says_so() -> None:
    observer = Observer()
    observer.observe(torch.tensor([[7]]), torch.tensor([[0]]), 5)
    with pytest.raises(WorkloadError, match="no call with a usable prompt"):
        observer.workload()


def test_observer_stays_within_the_context() -> None:
    observer = Observer(context=20)
    observer.observe(torch.full((1, 30), 7), None, 64)
    observer.observe(torch.full((1, 12), 7), None, 64)
    assert observer.workload() == Workload(((7,) * 12,), 8, (1,))


def test_a_prompt_that_nearly_fills_the_context_does_not_shorten_the_others_answers() -> None:
    observer = Observer(context=200)
    for length in (100, 199, 100):
        observer.observe(torch.full((1, length), 7), None, 64)
    assert observer.workload() == Workload(((7,) * 100,) * 2, 64, (1,))


def test_observer_keeps_its_own_copy() -> None:
    observer, ids, mask = Observer(), torch.tensor([[7, 8]]), torch.tensor([[True, True]])
    observer.observe(ids, mask, 5)
    ids.zero_()
    mask.zero_()
    assert observer.workload().prompts == ((7, 8),)


def test_observer_is_bounded_and_thread_safe() -> None:
    observer, ids = Observer(), torch.full((100, 3), 7)

    def call() -> None:
        for batch in range(1, 41):
            observer.observe(ids[:batch], None, 5)
            observer.workload()

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    work = observer.workload()
    assert len(work.prompts) == OBSERVED_PROMPTS
    assert len(work.batch_sizes) == workload.OBSERVED_BATCHES
    assert observer.ready(160)
    assert not observer.ready(161)
    assert json.dumps(work.new_tokens) == "5"
