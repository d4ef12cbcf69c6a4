"""INT4 numbers chosen for the inputs that a layer reads: the rounding error of one is made up for by those after it.

This is GPTQ (Frantar et al. 2022, arXiv:2210.17323). It minimises the error of the layer's outputs, where rounding to
the nearest number minimises that of the weights. The format is the same, and so are the kernels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import pack

# Share of the mean diagonal that is added to the diagonal. The paper adds 0.01, with 262 000 tokens. With 3000 tokens
# that fits them and no others: layers with 1536 inputs lost more on other texts than with the nearest numbers.
DAMPING = 0.2
BLOCK = 128  # inputs after which all later ones make up for the errors so far, as in the paper
AT_ONCE = 2**22  # weights rounded at a time: 16 MB in FP32; with fewer, more time goes into starting operators


def moments(inputs: Tensor) -> Tensor:
    """X^T X [K, K] of inputs [..., K], in FP32. Each token counts alike, however large its numbers are."""
    rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
    rows = torch.nn.functional.normalize(rows)
    return rows.T @ rows


def quantize_i4(weight: Tensor, moments: Tensor, group: int = pack.GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise to the INT4 of `pack.quantize_i4` so that the layer's outputs change little.

    Args:
        weight: [N, K], floating point.
        moments: [K, K] FP32, of what the layer reads. An input that is always 0 gets its nearest number.
        group: as in `pack.quantize_i4`.

    Raises:
        ValueError: the moments are not finite, or `pack.quantize_i4` refuses the weight.
    """
    if not torch.isfinite(moments).all():
        raise ValueError("the layer's inputs hold NaN or infinity")
    damped = moments.clone()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
    importance = diagonal / diagonal.mean()
    order = importance.argsort(descending=True, stable=True)  # the errors of those that count most find most takers
    lower = torch.linalg.cholesky(damped[order][:, order])
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    shares = upper / upper.diagonal()[:, None]  # row k: what later weights take of the error of the k-th in order
    rounding = partial(_round, importance=importance, order=order.tolist(), shares=shares)
    return pack.quantize_i4(weight, group, rounding, AT_ONCE)


def _round(
    grouped: Tensor, dtype: torch.dtype, importance: Tensor, order: list[int], shares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A `pack.Rounding`, for the inputs in an order. What pads the last group is no input and keeps its number."""
    rows, groups, group = grouped.shape
    padding = groups * group - len(order)
    counts = torch.nn.functional.pad(importance, (0, padding)).view(groups, group)
    numbers, scales, zeros = pack.nearest_i4(grouped, dtype, counts)
    by_input = numbers.flatten(1).T.contiguous()  # [K padded, n]; the weights of an input are neighbours
    left = grouped.flatten(1).T[order]  # [K, n], in order
    steps, origins = scales.T.contiguous(), zeros.T.contiguous()  # [groups, n]
    for first in range(0, len(order), BLOCK):
        last = min(first + BLOCK, len(order))
        errors = left.new_empty(last - first, rows)
        for k in range(first, last):
            step, origin = steps[order[k] // group], origins[order[k] // group]
            number = by_input[order[k]].copy_(pack.to_i4(left[k], step, origin))
            error = torch.sub(left[k], torch.addcmul(origin, number, step), out=errors[k - first])
            left[k + 1 : last].addr_(shares[k, k + 1 : last], error, alpha=-1)
        left[last:].addmm_(shares[first:last, last:].T, errors, alpha=-1)
    return by_input.T.reshape(rows, groups, group), scales, zeros
