"""A device's peaks: read bandwidth, and matmul FLOP/s by dtype; on a CPU also what one core and torch's kernels read.

Everything is tried twice, about a second apart, because the load from others rarely stays the same. If the two tries
differ much, even the better one may be too low.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import nan
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from . import intraop
from .roofline import matmul_flops

if TYPE_CHECKING:
    from .device import Device

READ_ROUNDS = 3  # rounds of a try; the first warms up
SIDES = (256, 512, 1024, 2048, 4096, 8192)  # sides of square matmuls, tried until one takes long enough to be the peak
HOPELESS_FLOPS_PER_S = 1e9  # any vector unit is faster: below it the dtype is emulated, and larger sides are skipped
MATMUL_S = 0.04  # seconds after which a matmul's start-up cost is negligible: larger ones run no faster
MATMUL_ROUNDS, MATMUL_LIMIT_S = 3, 0.1  # rounds of one size in a try, and seconds after which no round is added
CLOCKS_S = 0.3  # work after which an idle GPU's clocks are up; power states change within tens of milliseconds each
VECTOR_SIDE = 1024  # side of the matrices that are multiplied by a vector: libraries reach less with shorter rows
FP8_CAPABILITY = (8, 9)  # Ada, Hopper and later multiply FP8 on tensor cores

Multiply = Callable[[], torch.Tensor]
Turn = Callable[[], AbstractContextManager[object]]
Prepare = Callable[["Device", int], Multiply]  # a device and a side -> a matmul that is ready to run


@dataclass(frozen=True)
class Peaks:
    """The best of two tries.

    Args:
        bandwidth_bytes_per_s: bandwidth of a large sequential read.
        flops_per_s: FLOP/s of a square matmul, by dtype name.
        spread: largest relative difference between the two tries of a peak, a fraction of the better one.
        vector_bytes_per_s: bytes/s of weights that torch multiplies by one row, by dtype name; on a CPU.
        core_bytes_per_s: bandwidth of one thread; NaN but on a CPU.
    """

    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    spread: float
    vector_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    core_bytes_per_s: float = nan


def measure(device: Device, turn: Turn = nullcontext) -> Peaks:
    """Measure a device's peaks, in two to three seconds on a CPU.

    For a dtype that the machine only emulates, the figure is that of a tiny matmul. On a GPU, FP32 is measured as the
    process computes it: "tf32" (on tensor cores) or "float32" (IEEE). The other one is absent, because torch's setting
    is the whole process's, and the user's threads would compute in it meanwhile. Dtypes that a device cannot multiply
    are absent, too.

    Args:
        device: the device.
        turn: makes a context that keeps live requests out. Each reading is taken inside one, because requests would
            disturb it.
    """
    reads, matmuls = _reads(device), _matmuls(device)
    _raise_clocks(device, reads, turn)
    early = {"": (_bandwidth(device, reads, turn), 0)}
    early |= {name: _peak(device, prepare, turn) for name, prepare in matmuls.items()}
    late = {name: _peak(device, matmuls[name], turn, (side,))[0] for name, (_, side) in early.items() if side}
    late[""] = _bandwidth(device, reads, turn)
    tries = {name: (peak, late[name]) for name, (peak, _) in early.items() if peak and late.get(name)}
    best = {name: max(both) for name, both in tries.items()}
    spread = max(_shortfall(*both, warms_up=device.asynchronous) for both in tries.values())
    found = Peaks(best.pop(""), best, spread)
    if device.asynchronous:
        return found
    vectors = {name: _vector(device, name, turn) for name, peak in best.items() if peak >= HOPELESS_FLOPS_PER_S}
    with intraop.computing_with(1):
        return replace(found, vector_bytes_per_s=vectors, core_bytes_per_s=_bandwidth(device, reads, turn))


def reading(device: Device) -> Callable[[], float]:
    """A function that measures the read bandwidth as it is now, in bytes/s; it keeps its memory."""
    reads = _reads(device)
    return lambda: _bandwidth(device, reads, nullcontext)


def _shortfall(early: float, late: float, warms_up: bool) -> float:
    """How far the lower try is below the other, a fraction. A slow first try is ignored if the device warms up."""
    if warms_up and early < late:
        return 0.0
    return 1 - min(early, late) / max(early, late)


def _reads(device: Device) -> list[tuple[int, Multiply]]:
    """Kernels that read more than the caches hold, each with the bytes that it moves.

    Decoding multiplies weights as a matrix times a vector; a dot product reads without a stride. BLAS and thread count
    decide which of the two is faster, and the peak is the better one. On a GPU a sum and a copy, which reads and
    writes, are tried as well: library products do not always saturate the memory bus.
    """
    rows = device.scratch_bytes() // 8192
    data = torch.ones(rows, 2, 1024, dtype=torch.float32, device=device.where)
    vector = torch.ones(1024, dtype=torch.float32, device=device.where)
    matrix, flat = data.view(-1, 1024), data.view(-1)
    reads: list[tuple[int, Multiply]] = [
        (data.nbytes, lambda: matrix.mv(vector)),
        (data.nbytes, lambda: flat.dot(flat)),
    ]
    if device.asynchronous:
        halves = flat.chunk(2)
        reads += [(data.nbytes, flat.sum), (data.nbytes, lambda: halves[0].copy_(halves[1]))]
    return reads


def _raise_clocks(device: Device, reads: list[tuple[int, Multiply]], turn: Turn) -> None:
    """Keep a GPU busy until its clocks are up: an idle one needs a few hundred milliseconds of work for that."""
    end = time.perf_counter() + CLOCKS_S if device.asynchronous else 0.0
    while time.perf_counter() < end:
        for _, read in reads:
            _seconds(device, read, turn)


def _bandwidth(device: Device, reads: list[tuple[int, Multiply]], turn: Turn) -> float:
    return max(size / _seconds(device, read, turn) for _ in range(READ_ROUNDS) for size, read in reads)


def _seconds(device: Device, work: Multiply, turn: Turn) -> float:
    with turn():
        return device.seconds(work)


def _matmuls(device: Device) -> Mapping[str, Prepare]:
    found = {"tf32" if device.asynchronous and uses_tf32() else "float32": _plain(torch.float32)}
    found |= {"bfloat16": _plain(torch.bfloat16), "float16": _plain(torch.float16)}
    if device.asynchronous:
        found["int8"] = _int8
        if tuple(map(int, device.identity().capability.split("."))) >= FP8_CAPABILITY:
            found["float8_e4m3fn"] = _float8
    return found


def _peak(device: Device, prepare: Prepare, turn: Turn, sides: Sequence[int] = SIDES) -> tuple[float, int]:
    """Peak FLOP/s, and the side of the matmul that reached it; both 0 if the dtype has no matmul.

    Tries larger and larger matmuls, which also raise a GPU's clocks, until one takes long enough.
    """
    best = (0.0, 0)
    for side in sides:
        if 8 * side * side > device.scratch_bytes():  # an operand and the result, at float32
            break
        try:
            fastest = _fastest(device, prepare(device, side), turn)
        except RuntimeError:  # no matmul in this dtype, or not enough memory for this side
            break
        best = max(best, (matmul_flops(side, side, side) / fastest, side))
        if fastest > MATMUL_S or best[0] < HOPELESS_FLOPS_PER_S:
            break
    return best


def _fastest(device: Device, multiply: Multiply, turn: Turn) -> float:
    taken = list[float]()
    while len(taken) < MATMUL_ROUNDS and sum(taken) <= MATMUL_LIMIT_S:
        taken.append(_seconds(device, multiply, turn))
    return min(taken)


def _vector(device: Device, dtype: str, turn: Turn) -> float:
    """The bytes/s of weights in products of one row, as decoding has them: a library's kernel may be far from memory's.

    On two cores with 31 GB/s, torch reads FP32 and BF16 at 15 GB/s and FP16 at 30.
    """
    row = torch.ones(1, VECTOR_SIDE, dtype=getattr(torch, dtype), device=device.where)
    pieces = max(1, device.scratch_bytes() // (VECTOR_SIDE * VECTOR_SIDE * row.element_size()))
    weights = torch.ones(pieces, VECTOR_SIDE, VECTOR_SIDE, dtype=row.dtype, device=device.where)

    def multiply() -> torch.Tensor:
        return torch.stack([F.linear(row, weight) for weight in weights])

    return weights.nbytes / min(_seconds(device, multiply, turn) for _ in range(READ_ROUNDS))


def _operand(device: Device, side: int) -> torch.Tensor:
    """Operand [side, side] float32; random on a GPU, which draws less power for equal numbers and clocks too high."""
    make = torch.randn if device.asynchronous else torch.ones
    return make(side, side, device=device.where)


def _plain(dtype: torch.dtype) -> Prepare:
    """Matmuls in the layout of linear layers: in FP16, one on two cores reaches 43 GFLOP/s so and 3.2 the other way."""

    def prepare(device: Device, side: int) -> Multiply:
        a = _operand(device, side).to(dtype)
        return lambda: F.linear(a, a)

    return prepare


def _int8(device: Device, side: int) -> Multiply:
    a = _operand(device, side).mul(40).clamp(-127, 127).to(torch.int8)
    b = a.t()  # the layout that tensor cores read
    return lambda: torch._int_mm(a, b)


def _float8(device: Device, side: int) -> Multiply:
    a, one = _operand(device, side).to(torch.float8_e4m3fn), torch.ones((), dtype=torch.float32, device=device.where)
    b = a.t()  # the layout that the operator demands
    return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def uses_tf32() -> bool:
    """Whether the process lets float32 matmuls on a GPU run on tensor cores."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
