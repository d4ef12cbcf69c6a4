"""Keys and values in FP16 slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..model.configured import text_config
from ..runtime.loop import decode
from ..runtime.variant import Stage, Transform
from . import one_query_attention
from .static_cache import no_slots, roomy_slots

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase


@dataclass(frozen=True)
class HalfCache(Transform):
    """Decode over slots that hold keys and values in FP16. The kernel widens them as it reads them.

    Prefill computes with full numbers, which are rounded once, when they are stored.
    """

    name: ClassVar[str] = "half_cache"
    stage: ClassVar[Stage] = Stage.CACHE
    summary: ClassVar[str] = "KV cache slots in FP16, half of FP32's bytes; a CPU kernel widens them as it reads"

    def __post_init__(self) -> None:
        if self.phase != "decode":
            raise ChoiceError("half_cache: phase must be 'decode'; prefill has no cache to read")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if variant.kv is not None:
            return f"the KV cache is {variant.kv}"
        if variant.slot_dtype == torch.float16:
            return "the KV cache is in FP16 already"
        kernel = one_query_attention.OneQueryAttention("decode")
        uses_it = one_query_attention.is_used(variant)
        return no_slots(variant.original) or (None if uses_it else kernel.unavailable(variant, hardware))

    def rehearsed(self) -> Transform:
        return self

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: attention takes as much less time as it reads fewer bytes."""
        phase = profile.phases["decode"]
        share = 1.0 if phase.compute_dtype in ("float16", "bfloat16") else 0.5
        return {"decode": ceilings.narrower_cache(phase, share)}

    def apply(self, variant: Variant) -> None:
        from ..runtime.cache.pool import CachePool

        if reason := no_slots(variant.original):
            raise TransformError(reason)
        one_query_attention.use_kernel(variant)
        config = text_config(variant.original)
        variant.caches = CachePool(config, roomy_slots(variant, torch.float16), dtype=torch.float16)
        variant.loop = decode

    def took_effect(self, variant: Variant) -> str | None:
        if not one_query_attention.is_used(variant):
            return "decode does not use the kernel that reads FP16"
        return None if variant.slot_dtype == torch.float16 else "the KV cache is not in FP16"
