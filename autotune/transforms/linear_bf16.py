"""BF16 matmuls in prefill over the weights as stored, for processors that multiply BF16 much faster than FP32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..model import linear_layers
from ..runtime import kernels
from ..runtime.kernels.bf16 import ARITHMETIC
from . import require
from .linears import CPU, LinearTransform, weight_bytes

if TYPE_CHECKING:
    from torch import nn

    from ..diagnose.costs import PhaseProfile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
NOT_PACKED = "decode has no packed weights that prefill could share"


@dataclass(frozen=True)
class StoredTransform(LinearTransform):
    """Exchange linear layers, and layers packed by the kernels, for ones that convert the same weights while reading.

    Args:
        weights: "own" for prefill's weights, "decode" for the packed weights of decode's layers. Packed weights have
            fewer bytes to read and their own precision, and the original's weights are no longer needed.
    """

    weights: str = "own"

    parts: ClassVar[int]  # BF16 numbers that one FP32 number is split into
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)  # for narrower weights, torch already uses BF16

    def __post_init__(self) -> None:
        if self.phase != "prefill":
            raise ChoiceError(f"{self.name}: phase must be 'prefill'; one token reads weights more than it multiplies")
        require(self.weights, ("own", "decode"), f"{self.name}: weights")

    @property
    def kind(self) -> type[nn.Module]:
        return kernels.Bf16Linear

    def made(self, new: nn.Module) -> bool:
        return isinstance(new, kernels.Bf16Linear) and not new.packed

    def layers(self, module: nn.Module) -> Mapping[str, Any]:
        return {**super().layers(module), **packed(module, self.skip)}

    def missing(self, where: torch.device = CPU) -> str | None:
        return kernels.available() or kernels.no_bf16_unit()

    def exchange(self, linear: nn.Linear) -> nn.Module:
        return kernels.Bf16Linear(linear, self.parts)

    def apply(self, variant: Variant) -> None:
        if self.weights == "decode":
            if not (shared := packed(variant.modules["decode"], self.skip)):
                raise TransformError(f"{self}: {NOT_PACKED}")
            for twin in variant.edit("prefill"):
                place(twin, shared)
        super().apply(variant)

    def exchange_in(self, twin: nn.Module) -> int:
        count = super().exchange_in(twin)
        for name, layer in packed(twin, self.skip).items():
            twin.set_submodule(name, kernels.Bf16Linear(layer, self.parts).train(layer.training))
            count += 1
        return count

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if self.weights == "decode" and not packed(variant.modules["decode"], self.skip):
            return NOT_PACKED
        if hardware.device == "cpu" and packed(variant.modules["prefill"], self.skip):
            return linear_layers.obstacle(variant.original) or self.missing()
        return super().unavailable(variant, hardware)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        read = weight_bytes(phase, 4) if self.weights == "decode" else phase.weight_bytes  # at best 4 bits each
        return ceilings.faster_weights(phase, hardware, read, compute_dtype=ARITHMETIC[self.parts])


@dataclass(frozen=True)
class LinearBf16(StoredTransform):
    """Round inputs and weights to BF16 just before the product. Sums are in FP32, and no copy is kept."""

    name: ClassVar[str] = "linear_bf16"
    summary: ClassVar[str] = "BF16 matmuls in prefill over the weights as stored, without a copy of them; C++ kernels"
    parts: ClassVar[int] = 1


@dataclass(frozen=True)
class LinearBf16x3(StoredTransform):
    """Split every number into two BF16 numbers and add three of their four products. The error is about 2^-16.

    Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
    computations", ARITH 2019.
    """

    name: ClassVar[str] = "linear_bf16x3"
    summary: ClassVar[str] = "FP32 matmuls in prefill as three of BF16 over split numbers; C++ kernels"
    lossless: ClassVar[bool] = True
    parts: ClassVar[int] = 2


def packed(model: nn.Module, skip: str) -> dict[str, kernels.PackedLinear]:
    """Layers packed by the kernels, by dotted name. A layer with several names appears under each."""
    named = model.named_modules(remove_duplicate=False)
    return {n: m for n, m in named if isinstance(m, kernels.PackedLinear) and not linear_layers.is_named(n, skip)}


def place(twin: nn.Module, layers: dict[str, kernels.PackedLinear]) -> None:
    """Put layers of decode into a twin for prefill by their names. What decode has merged is none of prefill's."""
    there = {name for name, _ in twin.named_modules(remove_duplicate=False)}
    for name in layers.keys() & there:
        twin.set_submodule(name, layers[name])
