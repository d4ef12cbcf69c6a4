"""Attention over slots in FlashAttention's kernel for sequences of different lengths, which needs no mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..diagnose import ceilings
from ..errors import ChoiceError
from ..machine import gpus
from ..model import seam
from ..runtime import attention_slots
from ..runtime.cache import slot_forward
from ..runtime.cache.slots import SlotCache
from ..runtime.variant import Stage, Transform
from .attention import operator_names, other_attention, unfit_dtype
from .static_cache import no_slots, slot_bytes, use_slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

LARGEST_HEAD, MULTIPLE = 256, 8  # source: torch's flash_attn/flash_api.cpp, mha_varlen_fwd
PROBE_SLOTS = 8  # slots of the step that shows which kernel runs


@dataclass(frozen=True)
class SlotAttention(Transform):
    """Decode with `runtime.attention_slots`: the filled slots are read, once for all query heads that share them.

    Slots are those that are there, else a static cache of their automatic number.
    """

    name: ClassVar[str] = "slot_attention"
    stage: ClassVar[Stage] = Stage.LOOP
    summary: ClassVar[str] = "FlashAttention over the filled slots of a static cache, without a mask, on a GPU"
    lossless: ClassVar[bool] = True
    sets: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        if self.phase != "decode":
            raise ChoiceError("slot_attention: phase must be 'decode'; prefill has no slots to read")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        from ..diagnose.work import attention_layers

        model = variant.modules["decode"]
        if hardware.device != "cuda":
            return f"the kernel is for CUDA devices; this model runs on {hardware.device}"
        if attention_slots.is_used(model):
            return "decode uses it already"
        if variant.kv is not None:
            return f"it reads slots, and the KV cache is {variant.kv}"
        if not (seam.supports(model, "sdpa") and seam.exchangeable_attention(model)):
            return f"{type(model).__name__} does not take other attention implementations"
        if reason := gpus.too_old(hardware, (8, 0), self.name) or unfit_dtype(self.name, model) or no_slots(model):
            return reason
        shapes = {(keys.kv_heads, keys.head_size) for keys in attention_layers(model)}
        if len(shapes) != 1:
            return f"its layers have keys of different shapes: {', '.join(f'{h} heads of {d}' for h, d in shapes)}"
        if (size := shapes.pop()[1]) > LARGEST_HEAD or size % MULTIPLE:
            return f"it takes heads of up to {LARGEST_HEAD} numbers, a multiple of {MULTIPLE}; this model's have {size}"
        return None

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: attention takes only the time of reading the cache."""
        return {"decode": ceilings.faster_attention(profile.phases["decode"], hardware)}

    def rehearsed(self) -> Transform:
        return self

    def extra_bytes(self, variant: Variant) -> float:
        return slot_bytes(variant)

    def apply(self, variant: Variant) -> None:
        seam.register_attention(attention_slots.IMPLEMENTATION, attention_slots.attend)
        for twin in variant.edit("decode"):
            seam.use_attention(twin, attention_slots.IMPLEMENTATION)
        use_slots(variant)

    def took_effect(self, variant: Variant) -> str | None:
        model = variant.modules["decode"]
        if not attention_slots.is_used(model):
            return f"decode uses {seam.attention_of(model)}"
        if attention_slots.OPERATOR in (seen := _of_a_step(model)):
            return None
        return f"a step computes attention by {other_attention(seen) or 'another kernel'} instead of its own"


@torch.no_grad()
def _of_a_step(model: PreTrainedModel) -> set[str]:
    """Names of the torch operators of one decode step over slots."""
    ids = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    prompt = seam.cache_in(model(input_ids=ids, use_cache=True))
    cache = SlotCache(prompt, PROBE_SLOTS)
    cache.fill(prompt, None)
    return operator_names(lambda: slot_forward.step(model, ids, torch.ones_like(ids), cache))
