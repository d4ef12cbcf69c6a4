"""Activations rounded to INT8 in front of packed layers: twice the rate of 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..model import linear_layers
from ..runtime import kernels
from .linears import CPU, LinearTransform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from ..diagnose.costs import PhaseProfile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant

NOT_PACKED = "it has no packed weights that this processor multiplies by bytes; weight_only makes them"


@dataclass(frozen=True)
class Int8Activations(LinearTransform):
    """Round the inputs of a phase's packed INT8, INT6 and INT4 layers to INT8, in groups of 32, token by token.

    Packed layers take inputs of 16 bits where the processor multiplies in integers, which is as good as FP32. With 8
    bits, products take about half the time (AVX2: INT4's alone), which pays where they are the limit: in prefill, and
    in decode of batches. Layers named by `skip` keep 16 bits.
    """

    name: ClassVar[str] = "int8_activations"
    summary: ClassVar[str] = "INT8 activations in groups of 32 for packed INT8, INT6 and INT4 weights; C++ kernels"

    def __post_init__(self) -> None:
        if self.phase == "both":
            raise ChoiceError("int8_activations: phase must be 'prefill' or 'decode'; each is judged by itself")

    @property
    def kind(self) -> type[nn.Module]:
        return kernels.RoundedLinear

    def made(self, new: nn.Module) -> bool:
        return False  # it makes nothing of a plain layer

    @property
    def wider_form(self) -> str:
        return "with activations of 16 bits"

    def missing(self, where: torch.device = CPU) -> str | None:
        return kernels.available() or kernels.no_byte_unit()

    def layers(self, module: nn.Module) -> Mapping[str, kernels.GroupedLinear]:
        return _precise(module, self.skip)

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device != "cpu":
            return f"it runs on cpu, not on {hardware.device}"
        if reason := linear_layers.obstacle(variant.original) or self.missing():
            return reason
        return None if self.layers(variant.modules[self.phases[0]]) else f"{self.phase}: {NOT_PACKED}"

    def extra_bytes(self, variant: Variant) -> float:
        return 0.0  # the new layers share the weights

    def exchange_in(self, twin: nn.Module) -> int:
        made: dict[int, kernels.RoundedLinear] = {}
        for name, layer in self.layers(twin).items():
            new = made.setdefault(id(layer), kernels.RoundedLinear(layer))
            twin.set_submodule(name, new.train(layer.training))
        return len(made)

    def apply(self, variant: Variant) -> None:
        if not self.missing() and not self.layers(variant.modules[self.phases[0]]):
            raise TransformError(f"{self}: {NOT_PACKED}")
        super().apply(variant)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        return ceilings.faster_weights(phase, hardware, phase.weight_bytes, compute_dtype="int8")


def _precise(module: nn.Module, skip: str) -> dict[str, kernels.GroupedLinear]:
    """Packed layers whose inputs may have 8 bits instead of 16, by dotted name, also those behind BF16 layers."""
    found: dict[str, kernels.GroupedLinear] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        held = layer.packed[0] if isinstance(layer, kernels.Bf16Linear) and layer.packed else layer
        if isinstance(held, kernels.GroupedLinear) and not isinstance(held, kernels.RoundedLinear):
            found[name] = held
    able = {bits: kernels.no_byte_unit(bits) is None for bits in (4, 6, 8)}
    return {name: held for name, held in found.items() if able[held.bits] and not linear_layers.is_named(name, skip)}
