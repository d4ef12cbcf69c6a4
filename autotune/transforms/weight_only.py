"""Weights quantised in groups. Activations keep 16 bits or more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from ..diagnose import ceilings
from ..runtime import kernels
from . import compensation, require
from .linears import CPU, LinearTransform, MixedTransform, is_made, joined, reuse, reusing, weight_bytes
from .weight_storage import WeightStorage

if TYPE_CHECKING:
    from torch import nn

    from ..diagnose.costs import PhaseProfile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant

SCALE_BITS = 16
COMPENSATED = "compensated"
KINDS: dict[int, type[kernels.QuantisedLinear]] = {8: kernels.Int8Linear, 6: kernels.Int6Linear, 4: kernels.Int4Linear}


@dataclass(frozen=True)
class WeightOnly(MixedTransform):
    """Quantise linear weights and dequantise them in registers as they are read.

    Products are in integers over activations of 16 bits where the processor has AVX2 or VNNI, else in FP32.

    Args:
        bits: 8 or 6 (symmetric, a scale per group), or 4 (asymmetric, a scale and a zero per group).
        group: inputs that share a scale: 32, 64 or 128; 0 for one scale per output row.
        wide: layers that get a wider form: 8 bits instead of 4 or 6, FP16 instead of 8.
        wide_as: "int6" if these layers get 6 bits instead of 4, else "".
        rounding: "" for the nearest numbers, or for 4 bits "compensated" (GPTQ): each weight's error is made up for by
            others of its row, as far as that is possible for what the layer reads when the model reads texts that it
            wrote itself. So the numbers follow from the model alone. Layers of more than 8192 inputs get the nearest.
    """

    bits: int = 8
    group: int = 32
    rounding: str = ""
    wide_as: str = ""

    name: ClassVar[str] = "weight_only"
    summary: ClassVar[str] = "INT8, INT6 or INT4 weights in groups; FP32 arithmetic or 16-bit activations; C++ kernels"

    def __post_init__(self) -> None:
        require(self.bits, KINDS, "weight_only: bits")
        require(self.group, (0, 32, 64, 128), "weight_only: group")
        require(self.rounding, ("", COMPENSATED) if self.bits == 4 else ("",), "weight_only: rounding")
        require(self.wide_as, ("", "int6") if self.bits == 4 else ("",), "weight_only: wide_as")

    @property
    def kind(self) -> type[kernels.QuantisedLinear]:
        return KINDS[self.bits]

    @property
    def recipe(self) -> Self:
        return replace(super().recipe, wide_as="")

    @property
    def wider(self) -> LinearTransform:
        if self.bits == 8:
            return WeightStorage(phase=self.phase)
        return replace(self.recipe, bits=6 if self.wide_as else 8, rounding="")

    @property
    def wider_form(self) -> str:
        if self.bits == 8:
            return "in FP16"
        return "at 6 bits" if self.wide_as else "at 8 bits"

    @property
    def widenings(self) -> tuple[Self, ...]:
        return (self,) if self.wide or self.bits != 4 else (replace(self, wide_as="int6"), self)

    @property
    def weight_bits(self) -> float:
        factors = 2 if self.bits == 4 else 1
        return self.bits + factors * SCALE_BITS / self.group if self.group else float(self.bits)

    def missing(self, where: torch.device = CPU) -> str | None:
        return kernels.available()

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        reason = super().unavailable(variant, hardware)
        if reason is not None or not self.rounding:
            return reason
        return compensation.delay(self._compensated(variant.modules[self.phases[-1]]), hardware)

    def extra_bytes(self, variant: Variant) -> float:
        if not self.rounding:
            return super().extra_bytes(variant)
        nearest = replace(self, rounding="").extra_bytes(variant)
        return nearest + compensation.room_bytes(self._compensated(variant.modules[self.phases[-1]]))

    def apply(self, variant: Variant) -> None:
        if not self.rounding or self.missing() is not None:
            super().apply(variant)
            return
        with reusing():
            for twin in variant.edit(self.phase):
                layers = self._compensated(twin)
                new = {name: layer for name, layer in layers.items() if not is_made(self.key(layer))}
                made = compensation.compensated(variant, twin, new, self.group)
                reuse({self.key(layers[name]): layer for name, layer in made.items()})
            super().apply(variant)

    def _compensated(self, module: nn.Module) -> dict[str, nn.Linear]:
        """The layers whose rounding is compensated. Of the others, those that are not wide get the nearest numbers."""
        return compensation.layers(module, joined(self.skip, self.wide))

    def exchange(self, linear: nn.Linear) -> nn.Module:
        return self.kind.from_linear(linear, group=self.group)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        return ceilings.faster_weights(phase, hardware, weight_bytes(phase, self.weight_bits), compute_dtype="int16")
