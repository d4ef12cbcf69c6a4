"""Prefill over decode's packed layers, for models whose own dtype is slow to multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..model import linear_layers
from ..runtime import kernels
from ..runtime.variant import Stage, Transform
from .linear_bf16 import NOT_PACKED, packed, place
from .linears import weight_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase


@dataclass(frozen=True)
class PackedPrefill(Transform):
    """Exchange prefill's linear layers for decode's packed ones: their precision and arithmetic, no copy.

    It pays if the processor multiplies the model's dtype more slowly than FP32. For BF16 and FP16, most processors do.
    """

    name: ClassVar[str] = "packed_prefill"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "prefill over decode's packed weights in their arithmetic, without a copy; C++ kernels"

    def __post_init__(self) -> None:
        if self.phase != "prefill":
            raise ChoiceError(f"{self.name}: phase must be 'prefill'; it takes over decode's layers")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device != "cpu":
            return f"it runs on cpu, not on {hardware.device}"
        if linear_layers.count(variant.modules["prefill"], kernels.PackedLinear):
            return "the linear layers of prefill are packed already"
        if not packed(variant.modules["decode"], ""):
            return NOT_PACKED
        return linear_layers.obstacle(variant.original)

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        phase = profile.phases["prefill"]
        read = weight_bytes(phase, 4)  # best case: 4 bits per weight
        return {"prefill": ceilings.faster_weights(phase, hardware, read, compute_dtype="int16")}

    def apply(self, variant: Variant) -> None:
        if not (shared := packed(variant.modules["decode"], "")):
            raise TransformError(f"{self}: {NOT_PACKED}")
        for twin in variant.edit("prefill"):
            place(twin, shared)

    def took_effect(self, variant: Variant) -> str | None:
        return (
            None
            if linear_layers.count(variant.modules["prefill"], kernels.PackedLinear)
            else "prefill has no packed layer"
        )
