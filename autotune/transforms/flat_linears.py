"""Linear layers that multiply a batch [B, T, K] as a matrix of rows [B T, K], which torch does not always do.

If a slice, or a dimension of size 1, has a stride that a dense tensor would not have, torch multiplies sequence by
sequence. In BF16 it then copies the weight for each sequence. Every prefill of `generate` has such a slice: the last
token's hidden states, which lm_head turns into logits. For a vocabulary of 128 256 and a hidden size of 2048, that took
2.3 s for one sequence and 19 s for eight. The same rows as a matrix take 0.03 s (`python -m benchmarks.flat`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diagnose import ceilings
from ..model.linear_layers import SharedLinear
from .linears import CPU, LinearTransform
from .wide_arithmetic import emulated

if TYPE_CHECKING:
    from ..diagnose.costs import PhaseProfile
    from ..machine.hardware import Hardware


class FlatLinear(SharedLinear):
    """y = x W^T + b over the rows of x, for any strides of x."""

    def forward(self, x: Tensor) -> Tensor:
        rows = F.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return rows.view(*x.shape[:-1], self.out_features)


@dataclass(frozen=True)
class FlatLinears(LinearTransform):
    """Exchange BF16 linear layers for ones that multiply rows. The arithmetic does not change."""

    name: ClassVar[str] = "flat_linears"
    summary: ClassVar[str] = "BF16 matmuls over rows: for a slice of a batch torch copies the weight for each sequence"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)

    @property
    def kind(self) -> type[nn.Module]:
        return FlatLinear

    def missing(self, where: torch.device = CPU) -> str | None:
        return "this processor only emulates BF16 (see wide_arithmetic)" if emulated(torch.bfloat16) else None

    def exchange(self, linear: nn.Linear) -> nn.Module:
        return FlatLinear(linear)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        return ceilings.faster_weights(phase, hardware, phase.weight_bytes)
