"""Weights quantised in groups. Activations keep 16 bits or more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from ..diagnose import ceilings
from ..runtime import kernels
from . import require
from .linears import CPU, LinearTransform, MixedTransform, weight_bytes
from .weight_storage import WeightStorage

if TYPE_CHECKING:
    from torch import nn

    from ..diagnose.costs import PhaseProfile
    from ..machine.hardware import Hardware

SCALE_BITS = 16
KINDS: dict[int, type[kernels.QuantisedLinear]] = {8: kernels.Int8Linear, 6: kernels.Int6Linear, 4: kernels.Int4Linear}


@dataclass(frozen=True)
class WeightOnly(MixedTransform):
    """Quantise linear weights and dequantise them in registers as they are read.

    Products are in integers over activations of 16 bits where the processor has AVX2 or VNNI, else in FP32.

    Args:
        bits: 8 or 6 (symmetric, a scale per group), or 4 (asymmetric, a scale and a zero per group).
        group: inputs that share a scale: 32, 64 or 128; 0 for one scale per output row.
        wide: layers that get the next wider form: 6 bits instead of 4, 8 instead of 6, or FP16 instead of 8.
    """

    bits: int = 8
    group: int = 32

    name: ClassVar[str] = "weight_only"
    summary: ClassVar[str] = "INT8, INT6 or INT4 weights in groups; FP32 arithmetic, or with 16-bit activations; C++ kernels"

    def __post_init__(self) -> None:
        require(self.bits, KINDS, "weight_only: bits")
        require(self.group, (0, 32, 64, 128), "weight_only: group")

    @property
    def kind(self) -> type[kernels.QuantisedLinear]:
        return KINDS[self.bits]

    @property
    def wider(self) -> LinearTransform:
        wider = min((bits for bits in KINDS if bits > self.bits), default=None)
        return WeightStorage(phase=self.phase) if wider is None else replace(self.recipe, bits=wider)

    @property
    def wider_form(self) -> str:
        wider = self.wider
        return f"at {wider.bits} bits" if isinstance(wider, WeightOnly) else "in FP16"

    @property
    def weight_bits(self) -> float:
        factors = 2 if self.bits == 4 else 1
        return self.bits + factors * SCALE_BITS / self.group if self.group else float(self.bits)

    def missing(self, where: torch.device = CPU) -> str | None:
        return kernels.available()

    def exchange(self, linear: nn.Linear) -> nn.Module:
        return self.kind.from_linear(linear, group=self.group)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        return ceilings.faster_weights(phase, hardware, weight_bytes(phase, self.weight_bits), compute_dtype="int16")
