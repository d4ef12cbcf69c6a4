"""INT8 weights in groups, multiplied on a GPU by a kernel in Triton."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from ..diagnose import ceilings
from . import require
from .linears import CPU, LinearTransform, weight_bytes

if TYPE_CHECKING:
    from ..diagnose.costs import PhaseProfile
    from ..machine.gpus import Capability
    from ..machine.hardware import Hardware

SCALE_BITS = 16
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class TritonInt8(LinearTransform):
    """Quantise linear weights to INT8 in groups, and widen them in registers as they are read.

    For up to 64 rows at once, as in decode: the numbers are those of `weight_only` on a CPU. More rows are multiplied
    by widened weights.

    Args:
        group: inputs that share a scale: 32, 64 or 128.
    """

    group: int = 32

    name: ClassVar[str] = "triton_int8"
    summary: ClassVar[str] = "INT8 weights in groups on a GPU, by a Triton kernel for few rows"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __post_init__(self) -> None:
        require(self.group, GROUPS, "triton_int8: group")

    @property
    def kind(self) -> type[nn.Module]:
        from ..runtime.narrow.layers import NarrowLinear

        return NarrowLinear

    @property
    def capability(self) -> Capability:
        return (8, 0)  # BF16 in tensor cores

    @property
    def weight_bits(self) -> float:
        return 8 + SCALE_BITS / self.group

    def missing(self, where: torch.device = CPU) -> str | None:
        return _missing(where)

    def exchange(self, linear: nn.Linear) -> nn.Module:
        from ..runtime.narrow.layers import NarrowLinear

        return NarrowLinear(linear, self.group)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        return ceilings.faster_weights(phase, hardware, weight_bytes(phase, self.weight_bits))


@functools.cache
def _missing(where: torch.device) -> str | None:
    """Why the kernel cannot run on a device, or None; a small layer is tried."""
    if importlib.util.find_spec("triton") is None:
        return "it needs Triton, which is not installed"
    try:
        layer = TritonInt8("decode").exchange(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16, device=where))
        for rows in (1, 2):
            layer(torch.zeros(rows, 64, dtype=torch.bfloat16, device=where))
    except Exception as error:  # a compiler and a driver may raise anything
        return f"Triton cannot run it here: {type(error).__name__}: {error}"
    return None
