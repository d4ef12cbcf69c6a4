"""FP32 arithmetic for long inputs of a 16-bit model over its own weights, for processors that only emulate 16 bits.

The products and sums are those of the original layer: 16-bit numbers are exact in FP32, and sums are kept in FP32 and
rounded once, as torch does. Only the order of the sums differs, which flips the last bit of one output in a few
thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diagnose import ceilings
from ..model.linear_layers import SharedLinear
from ..runtime.widening import NARROW
from .linears import CPU, LinearTransform

if TYPE_CHECKING:
    from ..diagnose.costs import PhaseProfile
    from ..machine.hardware import Hardware

FEWEST_ROWS = 16  # tokens; with fewer, converting the weights does not pay
PART_BYTES = 8 * 2**20  # bytes of FP32 weights that exist at a time


class WideLinear(SharedLinear):
    """y = x W^T + b in FP32, rounded to the layer's dtype. W is converted part by part and never kept in FP32.

    Args:
        linear: a layer with 16-bit weights.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._rows = max(1, PART_BYTES // (4 * self.in_features))  # rows of W per part

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) < FEWEST_ROWS or x.dtype != self.weight.dtype:
            return F.linear(rows, self.weight, self.bias).view(*x.shape[:-1], self.out_features)
        wide = rows.float()
        y = x.new_empty(len(wide), self.out_features)
        for first in range(0, self.out_features, self._rows):
            part = slice(first, first + self._rows)
            bias = None if self.bias is None else self.bias[part].float()
            y[:, part] = F.linear(wide, self.weight[part].float(), bias)
        return y.view(*x.shape[:-1], self.out_features)


@dataclass(frozen=True)
class WideArithmetic(LinearTransform):
    """Exchange 16-bit linear layers for ones that multiply in FP32 if there are at least FEWEST_ROWS tokens."""

    name: ClassVar[str] = "wide_arithmetic"
    summary: ClassVar[str] = "FP32 matmuls over 16-bit weights where the processor only emulates narrower ones; no copy"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = NARROW

    @property
    def kind(self) -> type[nn.Module]:
        return WideLinear

    def missing(self, where: torch.device = CPU) -> str | None:
        return None

    def exchange(self, linear: nn.Linear) -> nn.Module:
        return WideLinear(linear)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        return ceilings.faster_weights(phase, hardware, phase.weight_bytes, compute_dtype="float32")


def emulated(dtype: torch.dtype) -> bool:
    """Whether this processor only emulates a dtype: oneDNN, which torch uses on CPUs, has no matmul for it here."""
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
