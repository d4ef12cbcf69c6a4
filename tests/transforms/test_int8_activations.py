"""Activations of 8 bits before packed layers: what is exchanged and shared, what it promises, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from autotune.errors import ChoiceError, TransformError
from autotune.model import linear_layers
from autotune.runtime import kernels
from autotune.runtime.kernels.fused import GatedMlp
from autotune.runtime.variant import Variant
from autotune.transforms import Transform, make
from autotune.transforms.int8_activations import Int8Activations
from autotune.transforms.linears import reusing
from tests.models import tiny, token_prompts
from tests.transforms.test_packed_prefill import CPU
from tests.transforms.test_weights import profile_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REASON = kernels.available() or kernels.no_byte_unit()
needs_integers = pytest.mark.skipif(REASON is not None, reason=str(REASON))
pytestmark = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))

INT8, INT6, INT4 = (make("weight_only", {"bits": bits}, "decode") for bits in (8, 6, 4))
PACKED, FUSED = make("packed_prefill", {}, "prefill"), make("fused_layers", {}, "prefill")
DECODE, PREFILL = make("int8_activations", {}, "decode"), make("int8_activations", {}, "prefill")


def rounded(model: torch.nn.Module) -> list[str]:
    named = model.named_modules(remove_duplicate=False)
    return [name for name, layer in named if isinstance(layer, kernels.RoundedLinear)]


@needs_integers
@pytest.mark.parametrize("weights", [INT8, INT6, INT4], ids=str)
def test_decode_keeps_its_weights_and_rounds_its_inputs(weights: Transform, llama: PreTrainedModel) -> None:
    packed = Variant(llama).with_transform(weights)
    if reason := kernels.no_byte_unit(weights.params["bits"]):
        assert "no packed weights that this processor" in str(DECODE.unavailable(packed, CPU)), reason
        return
    candidate = packed.with_transform(DECODE)
    assert DECODE.took_effect(packed) is not None
    assert DECODE.took_effect(candidate) is None
    before, after = packed.modules["decode"], candidate.modules["decode"]
    assert len(rounded(after)) == linear_layers.count(before, kernels.GroupedLinear)
    assert linear_layers.stored_bytes(before, after) == linear_layers.stored_bytes(before)
    assert DECODE.extra_bytes(packed) == 0
    ids = torch.tensor(token_prompts(2, length=40))
    with torch.no_grad():
        got, expected = after(ids).logits, before(ids).logits
    assert not torch.equal(got, expected)
    assert (got - expected).norm() <= 0.05 * expected.norm()
    assert torch.equal(after.lm_head.dequantize(), before.lm_head.dequantize())


@needs_integers
@pytest.mark.parametrize("before", ["packed_prefill", "linear_bf16"])
def test_prefill_takes_over_whatever_multiplied_packed_weights(before: str, llama: PreTrainedModel) -> None:
    if before == "linear_bf16" and (reason := kernels.no_bf16_unit()):
        pytest.skip(reason)
    first = PACKED if before == "packed_prefill" else make("linear_bf16", {"weights": "decode"}, "prefill")
    candidate = Variant(llama).with_transforms([INT4, first, PREFILL])
    prefill, decode = candidate.modules["prefill"], candidate.modules["decode"]
    assert len(rounded(prefill)) == linear_layers.count(decode, kernels.Int4Linear)
    assert not rounded(decode)
    assert prefill.lm_head.weight is decode.lm_head.weight


@needs_integers
def test_layers_are_two_operators_around_attention(llama: PreTrainedModel) -> None:
    plain = Variant(llama).with_transforms([INT4, PACKED, PREFILL])
    fused = plain.with_transform(FUSED)
    blocks = [m for m in fused.modules["prefill"].modules() if isinstance(m, GatedMlp)]
    assert blocks
    ids = torch.tensor(token_prompts(1, length=50))
    with torch.no_grad(), torch.profiler.profile() as watched:
        got = fused.modules["prefill"](ids).logits
    counts = {each.key: each.count for each in watched.key_averages()}
    assert counts["autotune::layer_heads_rounded"] == counts["autotune::layer_end_rounded"] == len(blocks)
    assert counts["autotune::rms_norm"] == counts["autotune::linear_i4"] == 1  # after the last layer, and lm_head
    assert "autotune::gate_up" not in counts
    with torch.no_grad():
        expected = plain.modules["prefill"](ids).logits
    assert (got - expected).norm() <= 0.02 * expected.norm()  # a last bit moves a rounded number by a step


@needs_integers
def test_layers_that_are_named_keep_16_bits(llama: PreTrainedModel) -> None:
    candidate = Variant(llama).with_transforms([INT4, make("int8_activations", {"skip": "lm_head,v_proj"}, "decode")])
    decode = candidate.modules["decode"]
    assert isinstance(decode.lm_head, kernels.Int4Linear)
    assert all("v_proj" not in name for name in rounded(decode))
    assert rounded(decode)
    assert Int8Activations("decode", skip="lm_head").widened("v_proj").skip == "lm_head,v_proj"


@needs_integers
def test_a_recorded_step_is_the_modules(llama: PreTrainedModel) -> None:
    chain = [INT4, make("one_query_attention", {}, "decode"), make("step_program", {}, "decode")]
    plain, candidate = (Variant(llama).with_transforms([*chain, *more]) for more in ([], [DECODE]))
    assert candidate.step is not None
    ids = torch.tensor(token_prompts(1, length=12))

    def answer(variant: Variant) -> Any:
        from autotune.runtime.dispatch import serving

        return serving(variant).generate(ids, max_new_tokens=12, do_sample=False)

    assert answer(candidate).shape == answer(plain).shape
    steps = next(iter(candidate.step._steps.values()), None)  # type: ignore[attr-defined]
    assert steps is not None
    assert "linear_rounded" in {i.code for i in steps.program.instructions}


@needs_integers
def test_layers_made_for_one_are_not_mistaken_for_the_others(llama: PreTrainedModel) -> None:
    candidate = Variant(llama).with_transforms([INT4, DECODE])
    with reusing(candidate):
        assert not rounded(Variant(llama).with_transform(INT4).modules["decode"])


@pytest.mark.parametrize(
    ("before", "transform", "change", "said"),
    [
        ([], DECODE, {}, "decode: it has no packed weights"),
        ([INT8], PREFILL, {}, "prefill: it has no packed"),
        ([make("weight_storage", {}, "decode")], DECODE, {}, "no packed weights"),
        ([INT8], DECODE, {"device": "cuda"}, "not on cuda"),
    ],
)
def test_refusals(before: list[Any], transform: Transform, change: Any, said: str, llama: PreTrainedModel) -> None:
    assert said in str(transform.unavailable(Variant(llama).with_transforms(before), replace(CPU, **change)))


def test_a_processor_without_products_of_bytes_is_told(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "no_byte_unit", lambda bits=4: "this processor cannot multiply bytes")
    packed = Variant(llama).with_transform(INT4)
    assert "cannot multiply bytes" in str(DECODE.unavailable(packed, CPU))
    with pytest.raises(TransformError, match="cannot multiply bytes"):
        packed.with_transform(DECODE)


@pytest.mark.parametrize(
    ("linear_s", "least", "most"),
    [
        (0.5, 1.9, 2.0),  # 64 GFLOP at 140 GFLOP/s, then at 2.2 times that; 0.1 s beside them stay
        (0.05, 0.99, 1.01),  # memory is the limit: 1 GB at 20 GB/s
    ],
)
def test_it_promises_four_times_fp32s_products(linear_s: float, least: float, most: float) -> None:
    profile = profile_of(linear_s, 0.1, weight_bytes=1e9, flops=64e9 if linear_s == 0.5 else 1e9)
    assert least < PREFILL.predict(profile, CPU)["prefill"] < most


def test_it_is_for_one_phase_over_packed_layers(llama: PreTrainedModel) -> None:
    with pytest.raises(ChoiceError, match="each is judged by itself"):
        make("int8_activations", {}, "both")
    with pytest.raises(TransformError, match="no packed"):
        Variant(llama).with_transform(DECODE)


def test_models_of_other_dtypes_get_it(llama: PreTrainedModel) -> None:
    if REASON:
        pytest.skip(REASON)
    candidate = Variant(tiny("llama").bfloat16()).with_transforms([INT4, PACKED, PREFILL])
    with torch.no_grad():
        assert candidate.modules["prefill"](torch.tensor(token_prompts(1, length=40))).logits.dtype == torch.bfloat16
