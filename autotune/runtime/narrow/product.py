"""Few rows times weights of 8 or 4 bits, which are widened in registers: the bytes of a weight are read once.

The libraries' kernels move more than they must at a handful of rows: inductor reaches the memory's bandwidth for one
row alone, and multiplies several rows by 8-bit weights 20 times slower than by BF16 ones (H100, torch 2.11).

This module imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 64  # beyond, widened weights times many rows are faster by the libraries' own product
TENSOR_ROWS = 16  # the fewest rows of a tile that tensor cores multiply
ONE = 0x3F800000  # the bits of 1.0
NARROW = 4096  # outputs up to which tiles are too few for all multiprocessors, so that inputs are split, too
FUSED = {"enable_fp_fusion": True}  # multiply and add in one instruction: off by default from Triton 3.10


@triton.jit  # type: ignore[untyped-decorator]
def _linear_few_rows(  # type: ignore[no-untyped-def]
    x,  # [M, KX]
    numbers,  # int8 [N, K]
    scales,  # [N, K / GROUP]
    out,  # [SPLIT, M, N] FP32
    M,  # noqa: N803 - the names of matrix products
    N,  # noqa: N803
    KX,  # noqa: N803
    K: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    BM: tl.constexpr,  # noqa: N803
    BN: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
    SPLIT: tl.constexpr,  # noqa: N803
):
    """A tile of outputs from every SPLIT-th block of inputs; the parts are added in one order afterwards."""
    groups: tl.constexpr = K // GROUP
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part, first = tl.program_id(1), tl.program_id(2) * BM
    inside = n < N
    sums = tl.zeros((BN,), tl.float32) if BM == 1 else tl.zeros((BM, BN), tl.float32)
    for step in range((groups + BLOCKS * SPLIT - 1) // (BLOCKS * SPLIT)):
        block = (step * SPLIT + part) * BLOCKS
        group = block + tl.arange(0, BLOCKS)
        there = inside[:, None] & (group < groups)[None, :]  # [BN, BLOCKS]
        at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCKS, GROUP]
        number = tl.load(numbers + n[:, None, None] * K + at[None], mask=there[:, :, None], other=0).to(tl.float32)
        scale = tl.load(scales + n[:, None] * groups + group[None, :], mask=there, other=0).to(tl.float32)
        if BM == 1:
            row = tl.load(x + first * KX + at, mask=at < KX, other=0).to(tl.float32)
            sums += tl.sum(tl.sum(number * row[None], 2) * scale, 1)
        else:
            m = first + tl.arange(0, BM)
            k = block * GROUP + tl.arange(0, BLOCKS * GROUP)
            rows = tl.load(x + m[:, None] * KX + k[None, :], mask=(m < M)[:, None] & (k < KX)[None, :], other=0)
            weight = tl.reshape((number * scale[:, :, None]).to(rows.dtype), (BN, BLOCKS * GROUP))
            sums += tl.dot(rows, tl.trans(weight), out_dtype=tl.float32)
    if BM == 1:
        tl.store(out + (part * M + first) * N + n, sums, mask=inside)
    else:
        m = first + tl.arange(0, BM)
        at = (part * M + m)[:, None] * N + n[None, :]
        tl.store(out + at, sums, mask=(m < M)[:, None] & inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _linear_few_rows_int4(  # type: ignore[no-untyped-def]
    x,  # [M, KX]
    words,  # int32 [N, K / 8]; nibble j of a group's word w is the number of its input j * GROUP / 8 + w
    scales,  # [N, K / GROUP]
    zeros,  # [N, K / GROUP], what the number 8 stands for
    out,  # [SPLIT, M, N] FP32
    M,  # noqa: N803
    N,  # noqa: N803
    KX,  # noqa: N803
    one,  # int32, the bits of 1.0: a constant would cost one more instruction
    K: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    BM: tl.constexpr,  # noqa: N803
    BN: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
    SPLIT: tl.constexpr,  # noqa: N803
):
    """`_linear_few_rows` for numbers 0 to 15, eight in a word.

    Converting them to FP32 would take an A100 longer than reading them. Instead a number q becomes bits of 1 + q / 16,
    so that the weight, scale * (q - 8) + zero, is 16 * scale * (1 + q / 16) + (zero - 24 * scale).
    """
    groups: tl.constexpr = K // GROUP
    WIDTH: tl.constexpr = GROUP // 8  # noqa: N806 - words of a group
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part, first = tl.program_id(1), tl.program_id(2) * BM
    inside = n < N
    sums = tl.zeros((BN, BLOCKS), tl.float32) if BM == 1 else tl.zeros((BM, BN), tl.float32)
    for step in range((groups + BLOCKS * SPLIT - 1) // (BLOCKS * SPLIT)):
        block = (step * SPLIT + part) * BLOCKS
        group = block + tl.arange(0, BLOCKS)
        there = inside[:, None] & (group < groups)[None, :]  # [BN, BLOCKS]
        at = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [BLOCKS, WIDTH]
        word = tl.load(words + n[:, None, None] * (K // 8) + at[None], mask=there[:, :, None], other=0)
        scale = tl.load(scales + n[:, None] * groups + group[None, :], mask=there, other=0).to(tl.float32)
        zero = tl.load(zeros + n[:, None] * groups + group[None, :], mask=there, other=0).to(tl.float32) - 24 * scale
        scale *= 16
        products = tl.zeros((BN, BLOCKS, WIDTH), tl.float32)
        inputs = tl.zeros((BLOCKS, WIDTH), tl.float32)
        for j in tl.static_range(8):
            moved = word << (19 - 4 * j) if j < 5 else word >> (4 * j - 19)
            number = ((moved & 0x780000) | one).to(tl.float32, bitcast=True)  # 1 + q / 16
            if BM == 1:
                k = group[:, None] * GROUP + j * WIDTH + tl.arange(0, WIDTH)[None, :]
                row = tl.load(x + first * KX + k, mask=k < KX, other=0).to(tl.float32)
                products += number * row[None]
                inputs += row
            else:
                m = first + tl.arange(0, BM)
                i = tl.arange(0, BLOCKS * WIDTH)
                k = (block + i // WIDTH) * GROUP + j * WIDTH + i % WIDTH
                rows = tl.load(x + m[:, None] * KX + k[None, :], mask=(m < M)[:, None] & (k < KX)[None, :], other=0)
                weight = (number * scale[:, :, None] + zero[:, :, None]).to(rows.dtype)
                weight = tl.reshape(weight, (BN, BLOCKS * WIDTH))
                sums += tl.dot(rows, tl.trans(weight), out_dtype=tl.float32)
        if BM == 1:
            sums += tl.sum(products, 2) * scale + tl.sum(inputs, 1)[None, :] * zero
    if BM == 1:
        tl.store(out + (part * M + first) * N + n, tl.sum(sums, 1), mask=inside)
    else:
        m = first + tl.arange(0, BM)
        at = (part * M + m)[:, None] * N + n[None, :]
        tl.store(out + at, sums, mask=(m < M)[:, None] & inside[None, :])


def tile(rows: int, outputs: int, bits: int) -> dict[str, int]:
    """The shape of a tile, as the kernels name it, and the options that they are compiled with.

    For 8 bits the fastest of ten (one row) and of eight (several) on an H100, over layers of models with 1 and 8
    billion parameters. For 4 bits and one row a thread has eight outputs, which share what an input costs: 4.1
    instructions a weight for an H100, which has time for 5.3 while it reads one. No tile of 4 bits has been timed.
    """
    if rows == 1 and bits == 4:
        return {"BM": 1, "BN": 8, "BLOCKS": 64, "SPLIT": 1, "num_warps": 2, "num_stages": 2, **FUSED}
    if rows == 1:
        return {"BM": 1, "BN": 4, "BLOCKS": 64, "SPLIT": 1, "num_warps": 4, "num_stages": 2, **FUSED}
    split = 4 if outputs <= NARROW else 1
    return {"BM": TENSOR_ROWS, "BN": 32, "BLOCKS": 8, "SPLIT": split, "num_warps": 4, "num_stages": 3, **FUSED}


def product_int8(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """Multiply rows by weights that are scale * number.

    Args:
        x: [M, K'] in BF16, FP16 or FP32, contiguous; K' is at most K.
        numbers: INT8 [N, K].
        scales: [N, K / group].

    Returns:
        [M, N] FP32.
    """
    return _multiplied(_linear_few_rows, x, (numbers, scales), numbers.shape[1], 8)


def product_int4(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Multiply rows by weights that are scale * (number - 8) + zero.

    Args:
        x: [M, K'] in BF16, FP16 or FP32, contiguous; K' is at most K.
        words: INT32 [N, K / 8], in the order of `_linear_few_rows_int4`.
        scales, zeros: [N, K / group].

    Returns:
        [M, N] FP32.
    """
    return _multiplied(_linear_few_rows_int4, x, (words, scales, zeros), 8 * words.shape[1], 4, one=ONE)


def _multiplied(kernel: Any, x: Tensor, weights: tuple[Tensor, ...], inputs: int, bits: int, **more: int) -> Tensor:
    """Launch a kernel over all tiles and add the parts of the inputs: [M, N]."""
    (rows, given), (outputs, groups) = x.shape, weights[1].shape
    chosen: dict[str, Any] = tile(rows, outputs, bits)
    split = chosen["SPLIT"]
    out = torch.empty(split, rows, outputs, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(outputs, chosen["BN"]), split, triton.cdiv(rows, chosen["BM"]))
    fixed = {"K": inputs, "GROUP": inputs // groups}
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current GPU
        kernel[grid](x, *weights, out, rows, outputs, given, **more, **fixed, **chosen)
    return out.view(rows, outputs) if split == 1 else out.sum(0)


def _shape(x: Tensor, numbers: Tensor, *factors: Tensor) -> Tensor:
    return x.new_empty(len(x), len(numbers), dtype=torch.float32)


# Graphs, compilers and profiles see operators, not launches of kernels.
OPERATORS: Any = torch.library.Library("autotune", "FRAGMENT")  # type: ignore[no-untyped-call]
OPERATORS.define("linear_few_rows_int8(Tensor x, Tensor numbers, Tensor scales) -> Tensor")
OPERATORS.define("linear_few_rows_int4(Tensor x, Tensor words, Tensor scales, Tensor zeros) -> Tensor")
for _name, _product in (("linear_few_rows_int8", product_int8), ("linear_few_rows_int4", product_int4)):
    OPERATORS.impl(_name, _product, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autotune::{_name}", _shape, lib=OPERATORS)
