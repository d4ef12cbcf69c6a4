"""Another attention implementation, for the twin alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from autotune.errors import TransformError
from autotune.transforms.attention import Attention, in_use
from autotune.variant import Variant
from tests import models
from tests.test_transforms_contract import COMPILER

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def test_changes_one_phase(llama: PreTrainedModel) -> None:
    candidate = Variant(llama).with_transform(Attention("prefill", "eager"))
    assert in_use(candidate.modules["prefill"]) == {"eager"}
    assert candidate.modules["decode"] is llama
    assert in_use(llama) == {"sdpa"}
    ids = torch.tensor(models.token_prompts())
    with torch.no_grad():
        torch.testing.assert_close(candidate.modules["prefill"](ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "implementation", "says"),
    [
        ("llama", "sdpa", "sdpa is in use for"),
        ("llama", "flash_attention_2", "needs a CUDA device"),
        ("mamba", "sdpa", "does not support sdpa"),
        ("llama", "eager", None),
        ("gpt2", "eager", None),
    ],
)
def test_unavailable(architecture: str, implementation: str, says: str | None) -> None:
    reason = Attention("both", implementation).unavailable(Variant(models.tiny(architecture)), COMPILER)
    assert reason is None if says is None else says in (reason or "")


def test_a_refusal_is_a_transform_error(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PreTrainedModel, implementation: str) -> None:
        self.config._attn_implementation_internal = implementation
        raise ValueError("not today")

    monkeypatch.setattr(type(llama), "set_attn_implementation", refuse)
    with pytest.raises(TransformError, match="not today"):
        Variant(llama).with_transform(Attention("both", "eager"))
    assert in_use(llama) == {"sdpa"}


def test_took_effect_sees_another_implementation(llama: PreTrainedModel) -> None:
    transform = Attention("decode", "eager")
    candidate = Variant(llama).with_transform(transform)
    assert transform.took_effect(candidate) is None
    candidate.modules["decode"].set_attn_implementation("sdpa")
    assert transform.took_effect(candidate) == "decode uses sdpa instead of eager"
