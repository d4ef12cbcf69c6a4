"""Attention of one query over a cache, in a kernel that reads only the keys and values that the mask admits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..model import seam
from ..runtime.variant import Stage, Transform

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

IMPLEMENTATION = "autotune_one_query"  # the kernel's name in transformers' registry of attention implementations


@dataclass(frozen=True)
class OneQueryAttention(Transform):
    """Decode with `runtime.kernels.attend_one`: grouped heads share one pass, and empty slots are not read."""

    name: ClassVar[str] = "one_query_attention"
    stage: ClassVar[Stage] = Stage.ATTENTION
    summary: ClassVar[str] = "a CPU kernel for one query over the KV cache (flash-decoding)"
    sharded: ClassVar[bool] = True
    lossless: ClassVar[bool] = True
    sets: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        if self.phase != "decode":
            raise ChoiceError("one_query_attention: phase must be 'decode'; prefill has many queries")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device != "cpu":
            return f"the kernel is for CPUs; this model runs on {hardware.device}"
        model = variant.modules["decode"]
        if is_used(variant):
            return "decode uses it already"
        if not (seam.supports(model, "sdpa") and seam.exchangeable_attention(model)):
            return f"{type(model).__name__} does not take other attention implementations"
        from ..runtime import kernels

        return kernels.available()

    def rehearsed(self) -> Transform:
        return self

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: attention and the work around it take only the time of reading the cache."""
        return {"decode": ceilings.faster_attention(profile.phases["decode"], hardware)}

    def apply(self, variant: Variant) -> None:
        use_kernel(variant)

    def took_effect(self, variant: Variant) -> str | None:
        return None if is_used(variant) else f"decode uses {seam.attention_of(variant.modules['decode'])}"


def is_used(variant: Variant) -> bool:
    """Whether decode of a variant uses the kernel."""
    return seam.attention_of(variant.modules["decode"]) == IMPLEMENTATION


def use_kernel(variant: Variant) -> None:
    """Make decode use the kernel, unless it does already.

    Raises:
        TransformError: the kernels are not available.
    """
    from ..runtime import kernels

    if reason := kernels.available():
        raise TransformError(reason)
    seam.register_attention(IMPLEMENTATION, attend)
    if not is_used(variant):
        for module in variant.edit("decode"):
            seam.use_attention(module, IMPLEMENTATION)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, Q, D]
    key: torch.Tensor,  # [B, Hk, T, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: calls the kernel for one query, SDPA for more. Returns [B, Q, H, D]."""
    plain = all(kwargs.get(name) is None for name in seam.UNUSUAL)
    if query.shape[2] == 1 and query.shape[3] == value.shape[3] and plain:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        out: torch.Tensor = torch.ops.autotune.attend_one(query, key, value, None, attention_mask, scale)
        return out, None
    if key.dtype != query.dtype:  # slots may hold FP16
        key, value = key.to(query.dtype), value.to(query.dtype)
    return seam.sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
