"""Convert weights to the layout of the kernels and back, in plain torch; no compiler is needed.

Sixteen output rows form a block. In a block, the numbers for one input are neighbours, so that one vector load serves
sixteen rows. Rows are padded to whole blocks, and the results of padding are dropped. Inputs are padded to whole groups
with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from autotune.runtime.kernels import arena

ROWS = 16  # output rows in a block; kRows in linear.h
STEP = 8  # inputs decoded together; kStep in linear.h
GROUP = 32  # default number of inputs that share a scale
# Weights converted at a time: 2 MB in FP32. On two cores, parts of 16 MB took 1.5 times as long, and malloc kept four
# times as many freed bytes between the blocks.
PART = 2**19
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # fractions of a group's range that 4-bit quantisation tries

# Chooses INT4 for some rows: (weights FP32 [n, groups, group], dtype of scales and zeros) -> numbers
# [n, groups, group], scales and zeros [n, groups], all FP32.
Rounding = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor, Tensor]]


def interleave(parts: Iterable[Tensor], rows: int, inputs: int) -> Tensor:
    """Reorder a weight into blocks of sixteen rows.

    Args:
        parts: [n, K] each, one after another; all but the last hold whole blocks.
        rows: N, of all parts together.
        inputs: K after padding.

    Returns:
        [ceil(N / 16), inputs, 16], contiguous, with zeros as padding.
    """
    parts = iter(parts)
    first = next(parts)
    blocks, filled = arena.empty((-(-rows // ROWS), inputs, ROWS), first.dtype, first.device), 0
    for part in chain([first], parts):
        count, width = part.shape
        whole = _round_up(count, ROWS)
        if (count, width) != (whole, inputs):
            padded = part.new_zeros(whole, inputs)
            padded[:count, :width] = part
            part = padded
        end = filled + whole // ROWS
        blocks[filled:end] = part.view(-1, ROWS, inputs).transpose(1, 2)
        filled = end
    return blocks


def deinterleave(blocks: Tensor, rows: int, inputs: int) -> Tensor:
    """The inverse of `interleave`: [N, K] from [ceil(N / 16), K padded, 16]."""
    return blocks.transpose(1, 2).reshape(-1, blocks.shape[1])[:rows, :inputs].contiguous()


def pack_half(weight: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Store a weight [N, K] in FP16, BF16 or FP32 blocks.

    Raises:
        ValueError: a weight is not finite in `dtype` (FP16's largest number is 65504).
    """
    check(weight)

    def narrow(part: Tensor) -> Tensor:
        narrowed = part.detach().to(dtype)
        if not torch.isfinite(narrowed).all():
            raise ValueError(f"weights up to {part.abs().max():.3g} do not fit {dtype}; use torch.bfloat16 instead")
        return narrowed

    rows, inputs = weight.shape
    return interleave(map(narrow, _parts(weight)), rows, _round_up(inputs, STEP))


def quantize_i8(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Quantise to symmetric INT8 with one scale per group of inputs: weight = scale * number.

    Args:
        weight: [N, K], floating point.
        group: inputs that share a scale, a multiple of 8; 0 for one scale per output row.

    Returns:
        Numbers INT8 [ceil(N / 16), K padded, 16] and scales FP16 (FP32 if FP16 cannot hold them)
        [ceil(N / 16), groups, 16].

    Raises:
        ValueError: the weight is not a finite floating-point matrix, or the group is not a multiple of 8.
    """
    check(weight)
    parts = _parts(weight)
    scales = _finite(torch.cat([_grouped(part, group).abs().amax(-1) for part in parts])) / 127
    scales = scales.to(_factor_dtype(scales, scales))

    def numbers() -> Iterator[Tensor]:
        first = 0
        for part in parts:
            rows = slice(first, first := first + len(part))
            yield (
                (_grouped(part, group) / _divisor(scales[rows])[..., None])
                .round_()
                .clamp_(-127, 127)
                .to(torch.int8)
                .flatten(1)
            )

    rows, groups = scales.shape
    return interleave(numbers(), rows, _padded(weight.shape[1], group)), interleave([scales], rows, groups)


def nearest_i4(grouped: Tensor, dtype: torch.dtype, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Round each weight to the nearest number of its group: the `Rounding` by default.

    The range of a group begins as its minimum and maximum and is shrunk step by step; the range with the least squared
    error is kept. At four bits, clipping the rarest weights often costs less than coarser steps for all others.

    Args:
        importance: [groups, group], factors on the squared errors; None: all count alike.
    """
    low, high = grouped.aminmax(dim=-1)
    least = torch.full_like(low, torch.inf)
    numbers, scales, zeros = torch.empty_like(grouped), torch.empty_like(low), torch.empty_like(low)
    for share in SHRINK:
        scale = ((high - low) * (share / 15)).to(dtype).float()
        zero = ((high + low) / 2 + scale / 2).to(dtype).float()  # + scale / 2, because the middle of -8..7 is -1/2
        number = to_i4(grouped, scale[..., None], zero[..., None])
        error = torch.addcmul(zero[..., None] - grouped, number, scale[..., None]).square_()
        error = (error if importance is None else error.mul_(importance)).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        numbers = torch.where(better[..., None], number, numbers)
    return numbers, scales, zeros


def to_i4(weights: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest number in -8..7 of each weight."""
    return ((weights - zeros) / _divisor(scales)).round_().clamp_(-8, 7)


def quantize_i4(
    weight: Tensor, group: int = GROUP, rounding: Rounding = nearest_i4, at_once: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise to asymmetric INT4 with a scale and a zero per group of inputs.

    weight = scale * number + zero, with number in -8..7.

    Args:
        weight: [N, K], floating point.
        group: inputs that share a scale and a zero, a multiple of 8; 0 for one of each per output row.
        rounding: chooses the numbers, scales and zeros of some rows.
        at_once: weights that it gets at a time, about; default PART.

    Returns:
        Words INT32 [ceil(N / 16), K padded / 8, 16], with input 8i + j in the signed nibble j of word i. Scales and
        zeros in FP16 (FP32 if FP16 cannot hold them), [ceil(N / 16), groups, 16].

    Raises:
        ValueError: the weight is not a finite floating-point matrix, or the group is not a multiple of 8.
    """
    check(weight)
    parts = _parts(weight, at_once)
    ranges = [_grouped(part, group).aminmax(dim=-1) for part in parts]
    low, high = (_finite(torch.cat(ends)) for ends in zip(*ranges, strict=True))
    dtype = _factor_dtype((high - low) * (min(SHRINK) / 15), torch.maximum(-low, high))
    scales, zeros = torch.empty_like(low, dtype=dtype), torch.empty_like(low, dtype=dtype)

    def words() -> Iterator[Tensor]:
        first = 0
        for part in parts:
            rows = slice(first, first := first + len(part))
            numbers, scales[rows], zeros[rows] = rounding(_grouped(part, group), dtype)
            nibbles = numbers.to(torch.int32).view(len(part), -1, STEP) & 15  # [n, K / 8, 8]
            yield (nibbles << _shifts(nibbles.device)).sum(-1, dtype=torch.int32)

    rows, groups = low.shape
    packed = interleave(words(), rows, _padded(weight.shape[1], group) // STEP)
    return packed, interleave([scales], rows, groups), interleave([zeros], rows, groups)


def dequantize_i8(numbers: Tensor, scales: Tensor, rows: int, inputs: int) -> Tensor:
    """The FP32 weight [rows, inputs] that `linear_i8` computes with."""
    group = numbers.shape[1] // scales.shape[1]
    return deinterleave(numbers.float() * scales.float().repeat_interleave(group, 1), rows, inputs)


def dequantize_i4(words: Tensor, scales: Tensor, zeros: Tensor, rows: int, inputs: int) -> Tensor:
    """The FP32 weight [rows, inputs] that `linear_i4` computes with."""
    upper = words[:, :, None, :] << _shifts(words.device).flip(0)[:, None]  # [blocks, K / 8, 8, 16]
    numbers = (upper >> 28).flatten(1, 2).float()  # [blocks, K, 16]
    group = numbers.shape[1] // scales.shape[1]
    weight = numbers * scales.float().repeat_interleave(group, 1) + zeros.float().repeat_interleave(group, 1)
    return deinterleave(weight, rows, inputs)


def check(weight: Tensor) -> None:
    """Raise ValueError unless the weight is a floating-point matrix that is not empty."""
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"expected a floating-point weight [N, K] with N, K > 0, got {weight.dtype} {list(weight.shape)}"
        )


def _parts(weight: Tensor, at_once: int | None = None) -> list[Tensor]:
    """Split a weight [N, K] into views of whole blocks of rows, about `at_once` or PART weights each."""
    rows = max(1, (at_once or PART) // (ROWS * weight.shape[1])) * ROWS
    return [weight[first : first + rows] for first in range(0, len(weight), rows)]


def _padded(inputs: int, group: int) -> int:
    """Number of inputs after padding to whole groups."""
    whole = _round_up(inputs, STEP)
    return _round_up(inputs, min(group or whole, whole))


def _grouped(weight: Tensor, group: int) -> Tensor:
    """View [N, K] as FP32 [N, groups, group]. Padding repeats the last input, so that it does not widen a range."""
    check(weight)
    if group < 0 or group % STEP:
        raise ValueError(f"group must be a multiple of {STEP}, or 0 for one scale per row, not {group}")
    rows, inputs = weight.shape
    weight = weight.detach().float()
    if missing := _padded(inputs, group) - inputs:
        weight = torch.cat([weight, weight[:, -1:].expand(rows, missing)], 1)
    return weight.view(rows, -1, min(group or weight.shape[1], weight.shape[1]))


def _finite(extremes: Tensor) -> Tensor:
    """Check the largest or smallest weights of groups. If they are finite, all other weights are, too.

    Raises:
        ValueError: one of them is NaN or infinite.
    """
    if not torch.isfinite(extremes).all():
        raise ValueError("the weight holds NaN or infinity; it cannot be quantised")
    return extremes


def _factor_dtype(steps: Tensor, sizes: Tensor) -> torch.dtype:
    """FP16 if it keeps eleven bits of every step and holds every size, else FP32."""
    half = torch.finfo(torch.float16)
    fits = bool(((steps == 0) | (steps >= half.tiny)).all()) and bool((sizes <= half.max).all())
    return torch.float16 if fits else torch.float32


def _divisor(scales: Tensor) -> Tensor:
    """Turn scales into divisors. A group of equal weights has scale 0; any divisor works."""
    return torch.where(scales == 0, 1.0, scales.float())


def _shifts(device: torch.device) -> Tensor:
    return 4 * torch.arange(STEP, dtype=torch.int32, device=device)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
