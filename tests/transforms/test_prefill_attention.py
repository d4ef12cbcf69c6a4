"""Prefill through the attention kernel: whole models against SDPA, and every way back to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotune.errors import ChoiceError
from autotune.machine.hardware import Hardware
from autotune.runtime import attention_prompt, kernels
from autotune.runtime.variant import Variant
from autotune.transforms import make
from tests import models
from tests.transforms.test_contract import COMPILER

OPERATORS = kernels.available()
needs_operators = pytest.mark.skipif(OPERATORS is not None, reason=str(OPERATORS))
PRECISIONS = ["float32", *([] if OPERATORS or kernels.no_bf16_unit() else ["bfloat16", "bfloat16x3"])]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two served each call of the interface."""
    import transformers.modeling_utils  # noqa: F401 - keeps SDPA's function, so it must not be ours
    from transformers.integrations import sdpa_attention

    served, sdpa, kernel = [], sdpa_attention.sdpa_attention_forward, kernels.attend_many

    def ours(*args: Any) -> torch.Tensor:
        served.append("kernel")
        return kernel(*args)

    def theirs(*args: Any, **kwargs: Any) -> Any:
        served.append("sdpa")
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(kernels, "attend_many", ours)
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", theirs)
    return served


@needs_operators
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gpt-neox", "opt", "mistral-window", "phi3"])
def test_whole_models(architecture: str, precision: str, calls: list[str]) -> None:
    model = models.tiny(architecture, initializer_range=0.1)
    transform = make("prefill_attention", {"precision": precision}, "prefill")
    assert transform.unavailable(Variant(model), COMPILER) is None
    prefill = Variant(model).with_transform(transform).modules["prefill"]
    batch = models.left_padded()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        for inputs in (batch, {"input_ids": batch["input_ids"]}):
            expected, got = model(**inputs).logits, prefill(**inputs).logits
            torch.testing.assert_close(
                got[real], expected[real], atol=0.05 if precision == "bfloat16" else 1e-3, rtol=0
            )
    assert set(calls) == {"kernel"}


@needs_operators
@pytest.mark.parametrize(
    "unusual",
    [
        {"attention_mask": torch.zeros(1, 1, 6, 6)},
        {"attention_mask": torch.eye(6).bool().roll(1, 1)[None, None] | torch.eye(6).bool()},
        {"is_causal": False},
        {"dropout": 0.1},
        {"position_bias": torch.zeros(1, 2, 6, 6)},
    ],
    ids=["additive mask", "mask with holes", "bidirectional", "dropout", "bias"],
)
def test_other_attention_is_left_to_sdpa(unusual: dict[str, Any], calls: list[str]) -> None:
    q, k, v = (torch.randn(1, 2, 6, 16) for _ in range(3))
    arguments = {"attention_mask": None} | unusual
    out, _ = attention_prompt.attend(0, torch.nn.Module(), q, k, v, **arguments)
    assert out.shape == (1, 6, 2, 16)
    assert calls == ["sdpa"]


@pytest.mark.parametrize(
    ("phase", "params"), [("decode", {}), ("both", {}), ("prefill", {"precision": "bfloat"})], ids=str
)
def test_refused_choices(phase: str, params: dict[str, str]) -> None:
    with pytest.raises(ChoiceError):
        make("prefill_attention", params, phase)


@pytest.mark.parametrize(
    ("architecture", "device", "says"), [("llama", "cuda", "for CPUs"), ("mamba", "cpu", "other attention")]
)
def test_unavailable(architecture: str, device: str, says: str) -> None:
    hardware = Hardware(**{**vars(COMPILER), "device": device})
    reason = make("prefill_attention", {}, "prefill").unavailable(Variant(models.tiny(architecture)), hardware)
    assert says in (reason or "")
