"""Slots in FP16: what decode reads from them, what they cost, and what else may be combined with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from autotune.diagnose import ceilings
from autotune.diagnose.work import Forward
from autotune.errors import ChoiceError
from autotune.model import seam
from autotune.profile.survey import memory_use
from autotune.runtime import kernels
from autotune.runtime.cache import slot_forward, slots
from autotune.runtime.cache.rows import RowCache
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Transform, Variant
from autotune.transforms import make
from autotune.transforms.half_cache import HalfCache
from autotune.transforms.quantised_cache import QuantisedCache
from autotune.transforms.step_program import StepProgram
from autotune.transforms.weight_storage import WeightStorage
from tests.models import left_padded, tiny, token_prompts
from tests.runtime.test_batching import filled
from tests.runtime.test_loop import ask
from tests.transforms.test_contract import COMPILER
from tests.transforms.test_weights import profile_of

pytestmark = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
GPU = replace(COMPILER, device="cuda", capability="9.0", compiler=None)
LONG = torch.tensor([token_prompts(1, length=60)[0]])
ARCHITECTURES = ("llama", "qwen3", "gpt2", "gemma3", "mistral-window", "phi3")
HALF, PROGRAM = HalfCache("decode"), StepProgram("decode")
EXACT = WeightStorage("decode", "float16")  # programs multiply by packed weights; tiny models' are exact in FP16
RECORDED = (EXACT, HALF, PROGRAM)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_recorded_step_reads_what_the_modules_stored(arch: str, batch: int) -> None:
    """Keys and values are rounded alike by both, so the logits agree as closely as over FP32 slots."""
    model = tiny(arch)
    variant = Variant(model).with_transforms(RECORDED)
    module, prompt = variant.modules["decode"], torch.tensor(token_prompts(batch, length=11))
    cache = seam.growing_cache()
    model(prompt, **seam.over(model, cache))
    held = [slots.SlotCache(cache, 64, dtype=torch.float16) for _ in range(2)]
    for each in held:
        each.fill(cache, None)
    recorded: Any = variant.step.fitting(held[0]) if variant.step is not None else None
    for i in range(12):  # past the sliding windows of 8
        token, position = torch.tensor(token_prompts(batch, length=1, seed=i)), torch.full((batch, 1), 11 + i)
        expected = slot_forward.step(module, token, position, held[1])
        torch.testing.assert_close(recorded(token, position, held[0]), expected, atol=2e-4, rtol=1e-4)
        for each in held:
            each.advance()
    for one, other in zip((*held[0].keys, *held[0].values), (*held[1].keys, *held[1].values), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("chain", [(HALF,), RECORDED], ids=["alone", "recorded"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_answers_are_near_the_originals(arch: str, chain: tuple[Transform, ...]) -> None:
    model = tiny(arch, initializer_range=0.1)
    served = serving(Variant(model).with_transforms(chain))
    asked = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 3}
    mine, theirs = ask(served, LONG, **asked), ask(model, LONG, **asked)
    assert torch.equal(mine.logits[0], theirs.logits[0]), "the prompt is read before anything is stored"
    error = (mine.logits[1] - theirs.logits[1]).norm() / theirs.logits[1].norm()
    assert 0 < error < 2e-3
    assert seam.keys_and_values(seam.cache_in(mine))[0][0].dtype == torch.float32, "a caller gets the original's dtype"


def test_a_padded_batch_is_served() -> None:
    model = tiny("llama")
    served, padded = serving(Variant(model).with_transforms([HALF, PROGRAM])), left_padded()
    assert torch.equal(served.generate(**padded, max_new_tokens=8), model.generate(**padded, max_new_tokens=8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_model_keeps_its_slots_in_fp16(dtype: torch.dtype) -> None:
    """Its recorded step computes in FP32, and would hold FP32 slots."""
    model = tiny("llama").to(dtype)
    half = make("weight_only", {}, "decode")
    variant = Variant(model).with_transforms([half, HALF, PROGRAM])
    assert variant.slot_dtype == torch.float16
    assert serving(variant).generate(LONG, max_new_tokens=4).shape == (1, 64)


def test_an_evicted_row_comes_back_to_the_bit() -> None:
    """It is kept as stored, and stored again unrounded."""
    cache = filled(tiny("llama"), token_prompts(1, length=20)[0])
    rows = RowCache(cache, 96, 3, torch.float16)
    rows.join(0, cache)
    before = [held[0].clone() for held in (*rows.keys, *rows.values)]
    kept = rows.copy_of(0)
    rows.leave(0)
    rows.join(2, kept)
    assert all(torch.equal(held[2], was) for held, was in zip((*rows.keys, *rows.values), before, strict=True))
    assert before[0].dtype == torch.float16
    assert before[0].any()


@pytest.mark.slow
def test_a_compiled_step_is_over_the_same_slots() -> None:
    model = tiny("llama")
    variant = Variant(model).with_transforms([HALF, make("compile_step", {}, "decode")])
    assert variant.slot_dtype == torch.float16
    assert torch.equal(serving(variant).generate(LONG, max_new_tokens=8), model.generate(LONG, max_new_tokens=8))


@pytest.mark.parametrize("chain", [(HALF,), RECORDED], ids=["alone", "recorded"])
def test_its_cache_takes_half_of_the_bytes(chain: tuple[Transform, ...]) -> None:
    model = tiny("llama")
    variant = Variant(model).with_transforms(chain)
    plain, half = (memory_use(each, Forward(2, 30), 10).cache_bytes for each in (Variant(model), variant))
    assert half == plain / 2
    assert HALF.took_effect(variant) is None


@pytest.mark.parametrize(
    ("arch", "before", "hardware", "reason"),
    [
        ("llama", (), COMPILER, None),
        ("llama", (PROGRAM,), COMPILER, None),
        ("llama", (HALF,), COMPILER, "in FP16 already"),
        ("llama", (QuantisedCache("decode"),), COMPILER, "the KV cache is stored in int8"),
        ("llama", (), GPU, "the kernel is for CPUs"),
        ("mamba", (), COMPILER, "does not take position_ids"),
    ],
)
def test_where_it_cannot_be_tried_it_says_why(arch: str, before: Any, hardware: Any, reason: str | None) -> None:
    said = HALF.unavailable(Variant(tiny(arch)).with_transforms(before), hardware)
    assert said is None if reason is None else reason in (said or "")


def test_it_is_for_decode() -> None:
    with pytest.raises(ChoiceError, match="phase must be 'decode'"):
        make("half_cache", {}, "prefill")


@pytest.mark.parametrize(
    ("dtype", "attention_s", "promised"), [("float32", 0.4, 1 / 0.8), ("float32", 0.0, 1.0), ("bfloat16", 0.4, 1.0)]
)
def test_it_promises_half_of_attentions_time(dtype: str, attention_s: float, promised: float) -> None:
    profile = profile_of(linear_s=0.6, other_s=0.4, weight_bytes=1e9, flops=1e9, compute_dtype=dtype)
    phases = {name: replace(phase, attention_s=attention_s) for name, phase in profile.phases.items()}
    assert HALF.predict(replace(profile, phases=phases), COMPILER)["decode"] == pytest.approx(promised)


def test_a_wider_cache_promises_nothing() -> None:
    phase = replace(profile_of(0.6, 0.4, 1e9, 1e9).phases["decode"], attention_s=0.4)
    assert ceilings.narrower_cache(phase, 2.0) == 1.0
