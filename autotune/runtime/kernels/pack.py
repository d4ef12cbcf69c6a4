"""Convert weights to the layout of the kernels and back, in plain torch; no compiler is needed.

Sixteen output rows form a block. In a block, the numbers for one input are neighbours, so that one vector load serves
sixteen rows. Rows are padded to whole blocks, and the results of padding are dropped. Inputs are padded to whole groups
with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from autotune.runtime.kernels import arena

ROWS = 16  # output rows in a block; kRows in linear.h
STEP = 8  # inputs decoded together; kStep in linear.h
GROUP = 32  # default number of inputs that share a scale
# Weights converted at a time: 2 MB in FP32. On two cores, parts of 16 MB took 1.5 times as long, and malloc kept four
# times as many freed bytes between the blocks.
PART = 2**19
# Bits of a weight by the dtype that its numbers are stored in. Three words of INT16 hold eight numbers of six bits.
BITS = {torch.int32: 4, torch.int16: 6, torch.int8: 8, torch.float16: 16, torch.bfloat16: 16, torch.float32: 32}
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # fractions of a group's range that 4-bit quantisation tries

# Chooses INT4 for some rows: (weights FP32 [n, groups, group], dtype of scales and zeros) -> numbers
# [n, groups, group], scales and zeros [n, groups], all FP32.
Rounding = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor, Tensor]]


def interleave(
    parts: Iterable[Tensor], rows: int, inputs: int, narrow: Callable[[Tensor], Tensor] = lambda blocks: blocks
) -> Tensor:
    """Reorder a weight into blocks of sixteen rows.

    Args:
        parts: [n, K] each, one after another; all but the last hold whole blocks.
        rows: N, of all parts together.
        inputs: K after padding.
        narrow: packs the numbers of blocks [n, inputs, 16] into fewer bytes; it keeps the first and the last size.

    Returns:
        [ceil(N / 16), inputs, 16], or what `narrow` makes of it, contiguous, with zeros as padding.
    """
    packed, filled = None, 0
    for part in parts:
        count, width = part.shape
        whole = _round_up(count, ROWS)
        if (count, width) != (whole, inputs):
            padded = part.new_zeros(whole, inputs)
            padded[:count, :width] = part
            part = padded
        blocks = narrow(part.view(-1, ROWS, inputs).transpose(1, 2))
        if packed is None:
            packed = arena.empty((-(-rows // ROWS), *blocks.shape[1:]), blocks.dtype, blocks.device)
        packed[filled : (filled := filled + len(blocks))] = blocks
    if packed is None:
        raise ValueError("there are no parts to reorder")
    return packed


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
    return _quantize_symmetric(weight, group, -127, 127)


def quantize_i6(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Quantise to symmetric INT6 with one scale per group of inputs: weight = scale * number, number in -32..31.

    Arguments and errors are those of `quantize_i8`. The largest weight of a group is -32 steps, so that all numbers are
    used: a scale has the other sign.

    Returns:
        Numbers INT16 [ceil(N / 16), 3 K padded / 8, 16], in the order of Int6 in linear.h, and scales as
        of `quantize_i8`.
    """
    return _quantize_symmetric(weight, group, -32, 31, narrow_i6)


def _quantize_symmetric(
    weight: Tensor, group: int, least: int, most: int, narrow: Callable[[Tensor], Tensor] = lambda blocks: blocks
) -> tuple[Tensor, Tensor]:
    check(weight)
    parts = _parts(weight)
    ranges = [_grouped(part, group).aminmax(dim=-1) for part in parts]
    low, high = (_finite(torch.cat(ends)) for ends in zip(*ranges, strict=True))
    scales = torch.where(high > -low, high, low) / least
    sizes = scales.abs()
    scales = scales.to(_factor_dtype(sizes, sizes))

    def numbers() -> Iterator[Tensor]:
        first = 0
        for part in parts:
            rows = slice(first, first := first + len(part))
            scaled = _grouped(part, group) / _divisor(scales[rows])[..., None]
            yield scaled.round_().clamp_(least, most).to(torch.int8).flatten(1)

    rows, groups = scales.shape
    return interleave(numbers(), rows, _padded(weight.shape[1], group), narrow), interleave([scales], rows, groups)


def narrow_i6(blocks: Tensor) -> Tensor:
    """INT16 [n, 3 K / 8, 16] from numbers of six bits [n, K, 16]."""
    count, inputs, rows = blocks.shape
    number = blocks.reshape(count, inputs // STEP, 2, 4, rows).to(torch.int16).unbind(3)  # each [n, K / 8, 2, 16]
    halves = number[2] << 10 | (number[3] & 63) << 4 | (number[1] >> 2 & 15)
    low, high = (number[0] << 2 | number[1] & 3).unbind(2)
    words = halves.transpose(2, 3).flatten(2)  # the two halves of a row's word are neighbours
    return torch.cat([words, low & 255 | high << 8], 2).view(count, -1, rows)


def widen_i6(packed: Tensor) -> Tensor:
    """The inverse of `narrow_i6`."""
    count, _, rows = packed.shape
    steps = packed.view(count, -1, 3 * rows)
    words, ends = steps[..., : 2 * rows], steps[..., 2 * rows :]
    halves = words.reshape(count, -1, rows, 2).transpose(2, 3)  # [n, K / 8, 2, 16]
    upper = torch.stack([ends << 8, ends], 2)  # the byte of each half as the upper one
    number = (upper >> 10, halves << 12 >> 10 | upper >> 8 & 3, halves >> 10, halves << 6 >> 10)
    return torch.stack(number, 3).view(count, -1, rows)


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


def dequantize_i6(packed: Tensor, scales: Tensor, rows: int, inputs: int) -> Tensor:
    """The FP32 weight [rows, inputs] that `linear_i6` computes with."""
    return dequantize_i8(widen_i6(packed), scales, rows, inputs)


def dequantize_i4(words: Tensor, scales: Tensor, zeros: Tensor, rows: int, inputs: int) -> Tensor:
    """The FP32 weight [rows, inputs] that `linear_i4` computes with."""
    upper = words[:, :, None, :] << _shifts(words.device).flip(0)[:, None]  # [blocks, K / 8, 8, 16]
    numbers = (upper >> 28).flatten(1, 2).float()  # [blocks, K, 16]
    group = numbers.shape[1] // scales.shape[1]
    weight = numbers * scales.float().repeat_interleave(group, 1) + zeros.float().repeat_interleave(group, 1)
    return deinterleave(weight, rows, inputs)


def padded_inputs(packed: Tensor) -> int:
    """K after padding of a packed weight's numbers."""
    return packed.shape[1] * packed.element_size() * 8 // BITS[packed.dtype]


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
