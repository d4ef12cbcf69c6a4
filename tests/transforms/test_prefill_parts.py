"""Prompts in parts: the same answers, the size of the parts, one caller at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from autotune.errors import ChoiceError
from autotune.runtime import kernels, reading
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.half_cache import HalfCache
from autotune.transforms.prefill_parts import PrefillParts
from autotune.transforms.static_cache import StaticCache
from autotune.transforms.step_program import StepProgram
from autotune.transforms.weight_only import WeightOnly
from autotune.transforms.weight_storage import WeightStorage
from tests.models import left_padded, tiny, token_prompts

PARTS = PrefillParts("prefill", tokens=5)
EXACT = WeightStorage("decode", "float16")  # programs multiply by packed weights; tiny models' are exact in FP16
CHAINS: dict[str, list[Transform]] = {
    "growing": [PARTS],
    "slots": [StaticCache("decode", slots=96), PARTS],
    "recorded": [EXACT, PARTS, StepProgram("decode")],
    "FP16": [EXACT, HalfCache("decode"), PARTS, StepProgram("decode")],
}
needs_kernels = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))


def noted(variant: Variant) -> list[tuple[int, ...]]:
    """The shapes of the ids that prefill computes, from now on."""
    module, shapes = variant.modules["prefill"], list[tuple[int, ...]]()
    module.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@needs_kernels
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("arch", ["llama", "gemma3", "mistral-window", "gpt2"])
def test_answers_are_the_originals(arch: str, chain: str) -> None:
    model = tiny(arch)
    served, padded = serving(Variant(model).with_transforms(CHAINS[chain])), left_padded()
    ids = torch.tensor(token_prompts(1, length=23))
    assert torch.equal(served.generate(ids, max_new_tokens=8), model.generate(ids, max_new_tokens=8))
    assert torch.equal(served.generate(**padded, max_new_tokens=8), model.generate(**padded, max_new_tokens=8))


@pytest.mark.parametrize(
    ("batch", "length", "parts"),
    [(1, 5, [5]), (1, 6, [5, 1]), (1, 12, [5, 5, 2]), (2, 5, [2, 2, 1]), (9, 3, [1, 1, 1])],
)
def test_a_part_has_at_most_so_many_tokens(batch: int, length: int, parts: list[int]) -> None:
    variant = Variant(tiny()).with_transforms([StaticCache("decode", slots=64), PARTS])
    variant.edit("prefill")
    shapes = noted(variant)
    serving(variant).generate(torch.tensor(token_prompts(batch, length=length)), max_new_tokens=2)
    assert shapes == [(batch, tokens) for tokens in parts]


def test_prompts_of_several_callers_are_read_one_after_the_other() -> None:
    """Otherwise all their activations are in memory at once."""
    variant, readers = Variant(tiny()).with_transforms([StaticCache("decode", slots=64), PARTS]), list[int]()
    (module,) = variant.edit("prefill")
    met = threading.Barrier(2, timeout=0.3)

    def meet(*_: Any) -> None:
        readers.append(threading.get_ident())
        try:
            met.wait()  # only another caller within its own forward would come
        except threading.BrokenBarrierError:
            met.reset()

    module.register_forward_pre_hook(meet)
    ids = torch.tensor(token_prompts(2, length=8))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda row: serving(variant).generate(row[None], max_new_tokens=2), ids))
    assert len(readers) == 4
    assert readers[0] == readers[1] != readers[2] == readers[3]


@needs_kernels
@pytest.mark.parametrize(("chain", "keeps"), [([], True), ([PARTS], False)])
def test_kernels_keep_nothing_of_a_prompt_in_parts(chain: list[Transform], keeps: bool) -> None:
    plan = [WeightOnly("both", bits=8), *chain, StepProgram("decode")]
    served = serving(Variant(tiny()).with_transforms(plan))
    kernels.free_kept()
    served.generate(torch.tensor(token_prompts(1, length=23)), max_new_tokens=3)
    assert (kernels.free_kept() > 0) == keeps


@needs_kernels
@pytest.mark.parametrize(("most", "keeps"), [(46, True), (45, False)])
def test_kernels_keep_nothing_of_a_long_prompt(most: int, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long are prompts whose tokens, all sequences together, are more than `MOST_KEPT`."""
    monkeypatch.setattr(reading, "MOST_KEPT", most)
    served = serving(Variant(tiny()).with_transforms([WeightOnly("both", bits=8), StepProgram("decode")]))
    kernels.free_kept()
    served.generate(torch.tensor(token_prompts(2, length=23)), max_new_tokens=3)
    assert (kernels.free_kept() > 0) == keeps


def test_what_it_refuses() -> None:
    with pytest.raises(ChoiceError, match="phase must be 'prefill'"):
        PrefillParts("decode")
    with pytest.raises(ChoiceError, match="tokens must be 1 or more, not 0"):
        PrefillParts("prefill", tokens=0)
    variant = Variant(tiny()).with_transform(PARTS)
    assert PARTS._obstacle(variant) == "prompts are read in parts of 5 tokens already"
