"""Prompts are read into slots: no copy lies beside them, and nothing of an earlier sequence stays in them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from autotune.model import seam
from autotune.runtime import kernels
from autotune.runtime.cache.pool import CachePool
from autotune.runtime.cache.slots import MAX_DISCARDED, SlotCache
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.transforms.half_cache import HalfCache
from autotune.transforms.step_program import StepProgram
from autotune.transforms.weight_only import WeightOnly
from tests.models import tiny, token_prompts

HEADS, DEPTH, LAYERS, SLOTS = 2, 16, 2, 256
needs_kernels = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))


def cache_of(tokens: int, batch: int = 1, number: float = 1.0) -> Any:
    """A prefilled cache."""
    return read(seam.growing_cache(), tokens, batch, number)


def read(cache: Any, tokens: int, batch: int = 1, number: float = 1.0) -> Any:
    """Give `tokens` more tokens to a cache, as prefill does; sequence i holds `number` + i."""
    states = number + torch.arange(batch, dtype=torch.float32).view(-1, 1, 1, 1).expand(batch, HEADS, tokens, DEPTH)
    for layer in range(LAYERS):
        cache.update(states.clone(), states.clone(), layer)
    return cache


def pool(rows: tuple[int, ...] = (), dtype: torch.dtype | None = None) -> CachePool:
    made = CachePool(tiny().config, SLOTS, rows, dtype=dtype)
    made.know(cache_of(1))
    return made


def held(cache: SlotCache) -> list[torch.Tensor]:
    return [*cache.keys, *cache.values]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("parts", [(12,), (5, 4, 3)], ids=["whole", "parts"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_prompt_that_is_read_into_slots_is_the_one_that_is_copied_there(
    batch: int, parts: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    mask = torch.ones(batch, 12)
    mask[-1, :4] = 0
    copied = SlotCache(cache_of(1), SLOTS, 4, dtype)
    copied.fill(cache_of(12, batch), mask)
    caches = pool((4,), dtype)
    with caches.read(batch) as prompt:
        for tokens in parts:
            read(prompt, tokens, batch)
        with caches.lend(prompt, mask) as found:
            for one, other in zip(held(found), held(copied), strict=True):
                assert torch.equal(one, other)
            assert torch.equal(found.valid, copied.valid)
            assert (found.batch, found.length, found.slot.item()) == (copied.batch, copied.length, copied.slot.item())
            assert found.given == torch.float32


@pytest.mark.parametrize("ended", [True, False], ids=["served", "failed in prefill"])
def test_nothing_of_an_earlier_sequence_stays(ended: bool) -> None:
    """A NaN stays NaN at attention weight 0."""
    caches = pool()
    with caches.read(1) as prompt:
        read(prompt, 2 * MAX_DISCARDED, number=torch.nan)
        if ended:
            with caches.lend(prompt, None) as served:
                served.advance()
    with caches.read(1) as prompt:
        read(prompt, 5)
        with caches.lend(prompt, None) as again:
            assert not any(bool(each.isnan().any()) for each in held(again))


def test_prompts_that_are_read_at_the_same_time_have_slots_of_their_own() -> None:
    caches = pool()
    with caches.read(1) as one, caches.read(1) as other:
        read(one, 6, number=1.0)
        read(other, 6, number=2.0)
        with caches.lend(one, None) as first, caches.lend(other, None) as second:
            assert {float(each[0, 0, 3, 0]) for each in held(first)} == {1.0}
            assert {float(each[0, 0, 3, 0]) for each in held(second)} == {2.0}


def live_bytes(known: set[int]) -> int:
    """Bytes of all tensors on the host whose memory is not known."""
    gc.collect()
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
    return sum(size for place, size in found.items() if place not in known)


def tensors() -> Iterator[torch.Tensor]:
    return (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))


class Weighing:
    """A streamer that weighs what lies beside the model and its slots at every token."""

    def __init__(self, known: set[int], slots: list[SlotCache]) -> None:
        self.known, self.slots, self.most = known, slots, 0

    def put(self, _: torch.Tensor) -> None:
        own = {t.untyped_storage().data_ptr() for cache in self.slots for t in held(cache)}
        self.most = max(self.most, live_bytes(self.known | own))

    def end(self) -> None: ...


@needs_kernels
@pytest.mark.parametrize("chain", [(), (HalfCache("decode"),)], ids=["FP32", "FP16"])
def test_no_copy_of_the_prompt_lies_beside_its_slots(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    variant = Variant(model).with_transforms([WeightOnly(bits=8), *chain, StepProgram("decode")])
    served, made, allocate = serving(variant), list[SlotCache](), SlotCache.__init__

    def noted(self: SlotCache, *args: Any, **kwargs: Any) -> None:
        allocate(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(SlotCache, "__init__", noted)
    ids = torch.tensor([token_prompts(1, length=200)[0]])
    one_copy = 2 * LAYERS * HEADS * ids.shape[1] * DEPTH * 2  # bytes of keys and values in FP16
    gc.collect()
    seen = Weighing({t.untyped_storage().data_ptr() for t in tensors()}, made)
    served.generate(ids, max_new_tokens=4, do_sample=False, streamer=seen)
    assert made
    assert 0 < seen.most < one_copy
