"""Prefill over decode's packed layers: what is shared, what it computes, when it promises something, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from autotune.errors import ChoiceError, TransformError
from autotune.machine.hardware import Hardware
from autotune.model import linear_layers
from autotune.runtime import kernels
from autotune.runtime.variant import Variant
from autotune.transforms import make
from tests.models import tiny, token_prompts
from tests.transforms.test_weights import profile_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))

SLOW = {"float32": 140e9, "bfloat16": 10e9, "float16": 10e9}  # FLOP/s of AVX2 alone
FAST = {"float32": 400e9, "bfloat16": 2500e9, "float16": 100e9}  # with a BF16 unit
CPU = Hardware("cpu", "CPU", "AVX2", 2, 24 * 10**9, 20e9, SLOW, "c++", {})
INT8, PREFILL = make("weight_only", {"bits": 8}, "decode"), make("packed_prefill", {}, "prefill")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_prefill_takes_over_decodes_layers(dtype: torch.dtype) -> None:
    packed = Variant(tiny("llama").to(dtype)).with_transform(INT8)
    assert PREFILL.unavailable(packed, CPU) is None
    candidate = packed.with_transform(PREFILL)
    assert PREFILL.took_effect(packed) is not None
    assert PREFILL.took_effect(candidate) is None
    prefill, decode = candidate.modules["prefill"], candidate.modules["decode"]
    assert prefill.lm_head is decode.lm_head
    assert linear_layers.stored_bytes(prefill, decode) == linear_layers.stored_bytes(decode)
    assert linear_layers.count(packed.modules["prefill"], kernels.PackedLinear) == 0
    ids = torch.tensor(token_prompts(2, length=40))
    with torch.no_grad():
        got, expected = prefill(ids).logits, decode(ids).logits
    assert got.dtype == dtype
    assert torch.equal(got, expected)


def test_layers_that_decode_left_alone_are_left_alone() -> None:
    skipping = make("weight_only", {"bits": 8, "skip": "lm_head"}, "decode")
    candidate = Variant(tiny("llama").bfloat16()).with_transforms([skipping, PREFILL])
    assert isinstance(candidate.modules["prefill"].lm_head, torch.nn.Linear)


@pytest.mark.parametrize(
    ("before", "hardware", "said"),
    [
        ([], CPU, "decode has no packed weights"),
        ([make("weight_only", {"bits": 8}, "both")], CPU, "packed already"),
        ([INT8], replace(CPU, device="cuda"), "not on cuda"),
    ],
)
def test_refusals(before: list[Any], hardware: Hardware, said: str, llama: PreTrainedModel) -> None:
    assert said in str(PREFILL.unavailable(Variant(llama).with_transforms(before), hardware))


@pytest.mark.parametrize(
    ("dtype", "linear_s", "peaks", "least", "most"),
    [
        ("bfloat16", 6.4, SLOW, 10.5, 11.5),  # 64 GFLOP at 10 GFLOP/s, then at 210; 0.3 s beside them stay
        ("float32", 0.457, SLOW, 1.2, 1.3),  # it computes in FP32 already: integers are 1.5 times as fast
        ("bfloat16", 0.0256, FAST, 0.5, 0.99),  # at 2500 GFLOP/s: FP32 is slower
    ],
)
def test_it_promises_what_fp32_arithmetic_saves(
    dtype: str, linear_s: float, peaks: dict[str, float], least: float, most: float
) -> None:
    profile = profile_of(linear_s, 0.3, weight_bytes=1e9, flops=64e9, compute_dtype=dtype)
    assert least < PREFILL.predict(profile, replace(CPU, flops_per_s=peaks))["prefill"] < most


def test_it_is_for_prefill_over_packed_layers(llama: PreTrainedModel) -> None:
    with pytest.raises(ChoiceError, match="'prefill'"):
        make("packed_prefill", {}, "both")
    with pytest.raises(TransformError, match="decode has no packed weights"):
        Variant(llama).with_transform(PREFILL)


def test_layers_that_decode_has_merged_are_none_of_prefills() -> None:
    model = tiny("llama")
    merged = Variant(model).with_transforms([make("merged_linears", {}, "decode"), INT8])
    prefill = merged.with_transform(PREFILL).modules["prefill"]
    names = {name for name, _ in prefill.named_modules()}
    assert names == {name for name, _ in model.named_modules()}
    assert prefill.lm_head is merged.modules["decode"].lm_head
