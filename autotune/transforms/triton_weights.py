"""Weights of 8 or 4 bits in groups, multiplied on a GPU by kernels in Triton."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from ..diagnose import ceilings
from . import require
from .linears import CPU, LinearTransform, MixedTransform, weight_bytes

if TYPE_CHECKING:
    from ..diagnose.costs import PhaseProfile
    from ..machine.gpus import Capability
    from ..machine.hardware import Hardware
    from ..runtime.narrow.layers import NarrowInt4Linear, NarrowInt8Linear

FACTOR_BITS = 16
GROUPS = (32, 64, 128)
MOST_WEIGHTS = 2**31  # the kernels count places in 32 bits


@dataclass(frozen=True)
class TritonWeights(MixedTransform):
    """Quantise linear weights to INT8 or INT4 in groups, and widen them in registers as they are read.

    For up to 64 rows at once, as in decode: the numbers are those of `weight_only` on a CPU. More rows are multiplied
    by widened weights.

    Args:
        bits: 8 (symmetric, a scale per group) or 4 (asymmetric, a scale and a zero per group).
        group: inputs that share a scale: 32, 64 or 128. Layers with fewer inputs are left as they are.
        wide: layers that get 8 bits instead of 4, or are left as they are.
    """

    bits: int = 8
    group: int = 32

    name: ClassVar[str] = "triton_weights"
    summary: ClassVar[str] = "INT8 or INT4 weights in groups on a GPU, by Triton kernels for few rows"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __post_init__(self) -> None:
        require(self.bits, (8, 4), "triton_weights: bits")
        require(self.group, GROUPS, "triton_weights: group")

    @property
    def kind(self) -> type[NarrowInt8Linear | NarrowInt4Linear]:
        from ..runtime.narrow import layers

        return layers.NarrowInt8Linear if self.bits == 8 else layers.NarrowInt4Linear

    @property
    def capability(self) -> Capability:
        return (8, 0)  # BF16 in tensor cores

    @property
    def wider(self) -> LinearTransform | None:
        return replace(self.recipe, bits=8) if self.bits == 4 else None

    @property
    def wider_form(self) -> str:
        return "at 8 bits" if self.bits == 4 else "as it was"

    @property
    def weight_bits(self) -> float:
        return self.bits + (1 if self.bits == 8 else 2) * FACTOR_BITS / self.group

    def missing(self, where: torch.device = CPU) -> str | None:
        return _missing(self.bits, where)

    def exchange(self, linear: nn.Linear) -> nn.Module | None:
        inputs = linear.in_features
        if inputs < self.group or linear.out_features * (inputs + self.group) > MOST_WEIGHTS:
            return None
        return self.kind(linear, self.group)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        return ceilings.faster_weights(phase, hardware, weight_bytes(phase, self.weight_bits))


@functools.cache
def _missing(bits: int, where: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None; a small layer is tried."""
    if importlib.util.find_spec("triton") is None:
        return "it needs Triton, which is not installed"
    try:
        small = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16, device=where)
        layer = TritonWeights("decode", bits=bits).kind(small, 32)
        for rows in (1, 2):
            layer(torch.zeros(rows, 64, dtype=torch.bfloat16, device=where))
    except Exception as error:  # a compiler and a driver may raise anything
        return f"Triton cannot run it here: {type(error).__name__}: {error}"
    return None
