"""A linear layer over the kernels of `product`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...model import linear_layers
from ..kernels import pack
from .product import MOST_ROWS, product


class NarrowLinear(linear_layers.Replacement):
    """A linear layer with weights of 8 bits in groups: the numbers that `kernels.Int8Linear` has on a CPU.

    Sums are in FP32. Where there are several rows, weights are rounded to the inputs' dtype before they are multiplied.

    Args:
        linear: the layer it replaces, on a GPU; it is only read.
        group: inputs that share a scale, a multiple of 8.

    Raises:
        ValueError: the weight is not finite.
    """

    def __init__(self, linear: nn.Linear, group: int) -> None:
        outputs, inputs = linear.weight.shape[0], -(-linear.weight.shape[1] // group) * group
        numbers, scales = pack.quantize_i8(linear.weight, group)
        numbers = pack.deinterleave(numbers, outputs, inputs)
        scales = pack.deinterleave(scales, outputs, inputs // group)
        bias = None if linear.bias is None else linear.bias.detach()
        held = [numbers, scales, *([] if bias is None else [bias])]
        super().__init__(linear, sum(each.nbytes for each in held), f"int8, groups of {group}")
        self.numbers, self.scales, self.bias = numbers, scales, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] > MOST_ROWS:
            return F.linear(x, self.widened(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        y = product(rows.contiguous(), self.numbers, self.scales)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def widened(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] that it multiplies by."""
        grouped = self.numbers.view(*self.scales.shape, -1) * self.scales[..., None].float()
        return grouped.to(dtype).flatten(1)[:, : self.in_features]
