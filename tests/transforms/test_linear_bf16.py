"""BF16 products over stored weights: accuracy, sharing, what they go over, and where they are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from autotune.errors import ChoiceError
from autotune.machine.hardware import Hardware
from autotune.model import linear_layers
from autotune.runtime import kernels
from autotune.runtime.variant import Variant
from autotune.transforms import make
from autotune.transforms.linears import LinearTransform, reusing
from tests import models
from tests.transforms.test_contract import COMPILER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ["linear_bf16", "linear_bf16x3"]
REASON = kernels.available() or kernels.no_bf16_unit()
needs_bf16 = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@needs_bf16
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(("name", "divergence"), [("linear_bf16", 1e-3), ("linear_bf16x3", 1e-9)])
def test_one_model(name: str, divergence: float, architecture: str) -> None:
    model = models.tiny(architecture, initializer_range=0.1)
    candidate = Variant(model).with_transform(make(name, {}, "prefill"))
    prefill, ids = candidate.modules["prefill"], torch.tensor(models.token_prompts(count=4, length=32))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids).logits.double(), -1) for m in (model, prefill))
    assert (p.exp() * (p - q)).sum(-1).mean().item() <= divergence
    assert not torch.equal(p, q)
    assert candidate.modules["decode"] is model
    assert linear_layers.stored_bytes(model, prefill) == linear_layers.stored_bytes(model), (
        "a copy of the weights was kept"
    )
    assert make(name, {}, "prefill").extra_bytes(Variant(model)) == 0


@needs_bf16
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_over_packed_weights_is_none_of_the_plain_one(name: str, llama: PreTrainedModel) -> None:
    transform = make(name, {}, "prefill")
    assert isinstance(transform, LinearTransform)
    packed = Variant(llama).with_transform(make("weight_only", {"bits": 4}, "both"))
    assert set(transform.layers(packed.modules["prefill"])) == set(transform.layers(llama))
    with reusing(packed.with_transform(transform)):
        alone = Variant(llama).with_transform(transform)
    found = [m for m in alone.modules["prefill"].modules() if isinstance(m, kernels.Bf16Linear)]
    assert {m.weight.dtype for m in found} == {torch.float32}


@needs_bf16
@pytest.mark.parametrize(
    "weights", [("weight_only", {"bits": 8}), ("weight_only", {"bits": 4}), ("weight_storage", {})]
)
@pytest.mark.parametrize("name", NAMES)
def test_over_packed_weights(name: str, weights: tuple[str, dict[str, int]], llama: PreTrainedModel) -> None:
    packed = Variant(llama).with_transform(make(*weights, "both"))
    transform = make(name, {}, "prefill")
    assert transform.unavailable(packed, COMPILER) is None
    candidate = packed.with_transform(transform)
    assert transform.took_effect(candidate) is None
    assert transform.took_effect(packed) is not None
    prefill, decode = candidate.modules["prefill"], candidate.modules["decode"]
    assert linear_layers.count(prefill, kernels.Bf16Linear) == linear_layers.count(decode, kernels.PackedLinear) > 0
    assert linear_layers.stored_bytes(prefill, decode) == linear_layers.stored_bytes(decode)
    ids = torch.tensor(models.token_prompts(count=2, length=40))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids).logits, -1) for m in (decode, prefill))
    assert (p.exp() * (p - q)).sum(-1).mean().item() <= 0.02


@needs_bf16
@pytest.mark.parametrize("name", NAMES)
def test_layers_that_decode_has_merged_are_none_of_prefills(name: str, llama: PreTrainedModel) -> None:
    plan = [make("merged_linears", {}, "decode"), make("weight_only", {"bits": 8}, "decode")]
    prefill = Variant(llama).with_transforms([*plan, make(name, {"weights": "decode"}, "prefill")]).modules["prefill"]
    assert {name for name, _ in prefill.named_modules()} == {name for name, _ in llama.named_modules()}
    assert isinstance(prefill.lm_head, kernels.Bf16Linear)


@pytest.mark.parametrize("phase", ["decode", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_for_prefill_only(name: str, phase: str) -> None:
    with pytest.raises(ChoiceError, match="'prefill'"):
        make(name, {}, phase)


@pytest.mark.parametrize("name", NAMES)
def test_unavailable(name: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = make(name, {}, "prefill")
    gpu = Hardware(**{**vars(COMPILER), "device": "cuda"})
    assert "not on cuda" in (transform.unavailable(Variant(llama), gpu) or "")
    monkeypatch.setattr(kernels, "available", lambda: None)
    monkeypatch.setattr(kernels, "no_bf16_unit", lambda: "this processor cannot multiply BF16")
    assert "cannot multiply BF16" in (transform.unavailable(Variant(llama), COMPILER) or "")
