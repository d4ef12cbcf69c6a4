"""Causal attention of a whole prompt, in a kernel that computes only what the mask admits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..model import seam
from ..runtime import attention_prompt, kernels
from ..runtime.variant import Stage, Transform
from . import require

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase


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
    sets: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        require(self.precision, attention_prompt.PARTS, "prefill_attention: precision")
        if self.phase != "prefill":
            raise ChoiceError("prefill_attention: phase must be 'prefill'; decode has one query")

    @property
    def implementation(self) -> str:
        """The kernel's name in transformers' registry of attention implementations."""
        return attention_prompt.NAMES[self.precision]

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device != "cpu":
            return f"the kernel is for CPUs; this model runs on {hardware.device}"
        model = variant.modules["prefill"]
        if (used := seam.attention_of(model)) in attention_prompt.NAMES.values():
            return f"prefill already uses {used}"
        if not (seam.supports(model, "sdpa") and seam.exchangeable_attention(model)):
            return f"{type(model).__name__} does not take other attention implementations"
        return self._missing()

    def rehearsed(self) -> Transform:
        return self

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: attention and the operators around it take only the time of attention's FLOPs."""
        return {"prefill": ceilings.faster_attention(profile.phases["prefill"], hardware, self.precision)}

    def apply(self, variant: Variant) -> None:
        if reason := self._missing():
            raise TransformError(reason)
        attention_prompt.register(self.precision)
        for module in variant.edit("prefill"):
            seam.use_attention(module, self.implementation)

    def took_effect(self, variant: Variant) -> str | None:
        used = seam.attention_of(variant.modules["prefill"])
        return None if used == self.implementation else f"prefill uses {used}"

    def _missing(self) -> str | None:
        return kernels.available() or (kernels.no_bf16_unit() if attention_prompt.PARTS[self.precision] else None)
