"""Weights stored in half the bytes; the arithmetic stays in FP32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..diagnose import ceilings
from ..runtime import kernels
from . import require
from .linears import CPU, LinearTransform, weight_bytes

if TYPE_CHECKING:
    from torch import nn

    from ..diagnose.costs import PhaseProfile
    from ..machine.hardware import Hardware


@dataclass(frozen=True)
class WeightStorage(LinearTransform):
    """Store linear weights in FP16 or BF16 and widen them in registers as they are read.

    FP16 keeps eleven significant bits, BF16 eight. A model whose weights were published in that dtype loses nothing.

    Args:
        dtype: "float16" or "bfloat16". FP16 cannot hold weights beyond 65504; `apply` raises then.
    """

    dtype: str = "float16"

    name: ClassVar[str] = "weight_storage"
    summary: ClassVar[str] = "FP16 or BF16 weights with FP32 arithmetic, C++ kernels"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.dtype, ("float16", "bfloat16"), "weight_storage: dtype")

    @property
    def kind(self) -> type[nn.Module]:
        return kernels.HalfLinear

    def missing(self, where: torch.device = CPU) -> str | None:
        return kernels.available()

    def exchange(self, linear: nn.Linear) -> nn.Module:
        return kernels.HalfLinear.from_linear(linear, dtype=getattr(torch, self.dtype))

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        return ceilings.faster_weights(phase, hardware, weight_bytes(phase, 16), compute_dtype="float32")
