"""Few rows times weights of 8 bits, which are widened in registers: the bytes of a weight are read once.

The libraries' kernels move more than they must at a handful of rows: inductor reaches the memory's bandwidth for one
row alone, and multiplies several rows by 8-bit weights 20 times slower than by BF16 ones (H100, torch 2.11).

This module imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

MOST_ROWS = 64  # beyond, widened weights times many rows are faster by the libraries' own product
TENSOR_ROWS = 16  # the fewest rows of a tile that tensor cores multiply
NARROW = 4096  # outputs up to which tiles are too few for all multiprocessors, so that inputs are split, too


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


def tile(rows: int, outputs: int) -> dict[str, int]:
    """The shape of a tile, as `_linear_few_rows` names it, and the warps that compute it.

    The fastest of ten (one row) and of eight (several) on an H100, over layers of models with 1 and 8 billion
    parameters.
    """
    if rows == 1:
        return {"BM": 1, "BN": 4, "BLOCKS": 64, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
    split = 4 if outputs <= NARROW else 1
    return {"BM": TENSOR_ROWS, "BN": 32, "BLOCKS": 8, "SPLIT": split, "num_warps": 4, "num_stages": 3}


def product(
    x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, shape: dict[str, int] | None = None
) -> torch.Tensor:
    """Multiply rows by weights that are scale * number.

    Args:
        x: [M, K'] in BF16, FP16 or FP32, contiguous; K' is at most K.
        numbers: INT8 [N, K].
        scales: [N, K / group].
        shape: of a tile; None chooses it.

    Returns:
        [M, N] FP32.
    """
    (rows, given), (outputs, inputs), groups = x.shape, numbers.shape, scales.shape[1]
    chosen: dict[str, Any] = dict(shape or tile(rows, outputs))
    split = chosen["SPLIT"]
    out = torch.empty(split, rows, outputs, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(outputs, chosen["BN"]), split, triton.cdiv(rows, chosen["BM"]))
    fixed = {"K": inputs, "GROUP": inputs // groups}
    _linear_few_rows[grid](x, numbers, scales, out, rows, outputs, given, **fixed, **chosen)
    return out[0] if split == 1 else out.sum(0)
