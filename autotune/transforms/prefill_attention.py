"""Causal attention of a whole prompt, in a kernel that computes only what the mask admits."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..model import seam
from ..runtime import kernels
from ..runtime.variant import Stage, Transform
from . import require

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

PARTS = {"float32": 0, "bfloat16": 1, "bfloat16x3": 2}  # precision -> BF16 numbers that an FP32 number is split into


@dataclass(frozen=True)
class PrefillAttention(Transform):
    """Prefill with `runtime.kernels.attend_many`: blocks that the mask excludes are skipped, keys are not repeated.

    Args:
        precision: arithmetic of the two products: "float32", "bfloat16", or "bfloat16x3" (three BF16 products of split
            numbers). The softmax is in FP32.
    """

    precision: str = "float32"

    name: ClassVar[str] = "prefill_attention"
    stage: ClassVar[Stage] = Stage.ATTENTION
    summary: ClassVar[str] = "a CPU kernel for causal attention over a prompt (flash attention)"
    sharded: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.precision, PARTS, "prefill_attention: precision")
        if self.phase != "prefill":
            raise ChoiceError("prefill_attention: phase must be 'prefill'; decode has one query")

    @property
    def implementation(self) -> str:
        """The kernel's name in transformers' registry of attention implementations."""
        return f"autotune_{self.precision}_prefill"

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device != "cpu":
            return f"the kernel is for CPUs; this model runs on {hardware.device}"
        model = variant.modules["prefill"]
        if (used := seam.attention_of(model)) in {f"autotune_{name}_prefill" for name in PARTS}:
            return f"prefill already uses {used}"
        if not (seam.supports(model, "sdpa") and seam.exchangeable_attention(model)):
            return f"{type(model).__name__} does not take other attention implementations"
        return self._missing()

    def rehearsed(self) -> Transform:
        return self

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: attention and the operators around it take only the time of attention's FLOPs."""
        return {"prefill": ceilings.faster_attention(profile.phases["prefill"], hardware)}

    def apply(self, variant: Variant) -> None:
        if reason := self._missing():
            raise TransformError(reason)
        seam.register_attention(self.implementation, functools.partial(attend, PARTS[self.precision]))
        for module in variant.edit("prefill"):
            seam.use_attention(module, self.implementation)

    def took_effect(self, variant: Variant) -> str | None:
        used = seam.attention_of(variant.modules["prefill"])
        return None if used == self.implementation else f"prefill uses {used}"

    def _missing(self) -> str | None:
        return kernels.available() or (kernels.no_bf16_unit() if PARTS[self.precision] else None)


def attend(
    parts: int,
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, Q, D]
    key: torch.Tensor,  # [B, Hk, T, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: calls the kernel if every query sees an unbroken span of keys, else SDPA.

    Returns:
        [B, Q, H, D].
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    usual = not dropout and not query.requires_grad and all(kwargs.get(name) is None for name in seam.UNUSUAL)
    if usual and query.shape[2] > 1 and query.device.type == "cpu":
        spans = _spans(attention_mask, query.shape[2], key.shape[2])
        if spans is not None or (attention_mask is None and causal and query.shape[2] == key.shape[2]):
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            return kernels.attend_many(query, key, value, spans, scale, parts), None
    return seam.sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _spans(mask: torch.Tensor | None, queries: int, keys: int) -> torch.Tensor | None:
    """The first key that each query sees and the one after its last, as [B or 1, Q, 2]; None for any other mask."""
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, queries, keys):
        return None
    spans: torch.Tensor = torch.ops.autotune.mask_spans(mask)
    return spans if spans.numel() else None
