"""Linear layers over the kernels of `product`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model import linear_layers
from ..kernels import pack
from .product import MOST_ROWS

EIGHTS = 0x88888888 - 2**32  # 8 in each nibble: makes the numbers -8 to 7 of the packer 0 to 15


class NarrowLinear(linear_layers.Replacement):
    """A linear layer with weights in groups: the numbers that `weight_only` has on a CPU.

    Sums are in FP32. Where there are several rows, weights are rounded to the inputs' dtype before they are multiplied.

    Args:
        linear: the layer it replaces, on a GPU; it is only read.
        weights: numbers, scales and further factors [N, groups], as the layer's product takes them.
        form: format of the weights.
    """

    def __init__(self, linear: nn.Linear, weights: tuple[Tensor, ...], form: str) -> None:
        bias = None if linear.bias is None else linear.bias.detach()
        held = [*weights, *([] if bias is None else [bias])]
        super().__init__(linear, sum(each.nbytes for each in held), form)
        self.weights, self.bias = weights, bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] > MOST_ROWS:
            return F.linear(x, self.widened(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        y = self.product(rows.contiguous())
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """Few rows [M, K] times the weights: [M, N] FP32."""
        raise NotImplementedError

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that it multiplies by."""
        raise NotImplementedError


class NarrowInt8Linear(NarrowLinear):
    """A `NarrowLinear` with INT8 weights and a scale per group.

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
        super().__init__(linear, (numbers, scales), f"int8, groups of {group}")

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.autotune.linear_few_rows_int8(x, *self.weights)  # type: ignore[no-any-return]

    def widened(self, dtype: torch.dtype) -> Tensor:
        numbers, scales = self.weights
        grouped = numbers.view(*scales.shape, -1) * scales[..., None].float()
        return grouped.to(dtype).flatten(1)[:, : self.in_features]


class NarrowInt4Linear(NarrowLinear):
    """A `NarrowLinear` with INT4 weights, a scale and a zero per group.

    A zero costs half a bit a weight in groups of 32. Without it, the error of normally distributed weights is 7 %
    larger, and that of weights with heavy tails 22 %.

    Args:
        linear: the layer it replaces, on a GPU; it is only read.
        group: inputs that share a scale and a zero, a multiple of 8.

    Raises:
        ValueError: the weight is not finite.
    """

    def __init__(self, linear: nn.Linear, group: int) -> None:
        weight = regrouped(linear.weight.detach(), group)
        outputs, inputs = weight.shape
        words, scales, zeros = pack.quantize_i4(weight, group)
        words = pack.deinterleave(words, outputs, inputs // 8) ^ EIGHTS
        factors = (pack.deinterleave(each, outputs, inputs // group) for each in (scales, zeros))
        super().__init__(linear, (words, *factors), f"int4, groups of {group}")

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.autotune.linear_few_rows_int4(x, *self.weights)  # type: ignore[no-any-return]

    def widened(self, dtype: torch.dtype) -> Tensor:
        words, scales, zeros = self.weights
        shifts = 4 * torch.arange(8, dtype=torch.int32, device=words.device)
        numbers = (words.view(*scales.shape, 1, -1) >> shifts[:, None] & 15).flatten(2)  # [N, groups, group]
        grouped = (numbers - 8) * scales[..., None].float() + zeros[..., None].float()
        return grouped.to(dtype).flatten(1)[:, : self.in_features]


def regrouped(weight: Tensor, group: int) -> Tensor:
    """Bring inputs [N, K] into the order in which `pack.quantize_i4` makes the words that the kernel reads.

    The last input is repeated until groups are full, as the packer does.

    Returns:
        [N, K padded]; the place 8w + j of a group has its input j * group / 8 + w.
    """
    if missing := -weight.shape[1] % group:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
    return weight.reshape(len(weight), -1, 8, group // 8).transpose(2, 3).flatten(1)
