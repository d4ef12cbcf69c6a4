"""What a device reaches at best: read bandwidth, and matmul FLOP/s by dtype."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .roofline import matmul_flops

if TYPE_CHECKING:
    from .device import Device

READ_ROUNDS = 6
SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of square matmuls, until one takes long enough to be the peak
HOPELESS_FLOPS_PER_S = 1e9  # no vector unit is this slow: the dtype is emulated, and the smallest matmul says enough
MATMUL_S = 0.04  # a matmul this long has paid for its start: larger ones run no faster
MATMUL_ROUNDS, MATMUL_LIMIT_S = 6, 0.15  # rounds of one size, and when to stop repeating it
FP8_CAPABILITY = (8, 9)  # Ada, Hopper and later multiply FP8 on tensor cores

Multiply = Callable[[], torch.Tensor]
Prepare = Callable[["Device", int], Multiply]  # a device and a side -> a matmul ready to be run


def read_bandwidth(device: Device) -> float:
    """Bytes per second of a large sequential read, the best of several rounds of a few kernels.

    A matrix times a vector is what decoding does to weights; a dot product reads without a stride. Which of them
    reaches further differs by BLAS and by thread count, and a peak is the better of the two. On a GPU a sum and a copy,
    which moves every byte twice, are tried as well: libraries' products do not always fill its memory's bus.
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
    rounds = [(size, read) for _ in range(READ_ROUNDS) for size, read in reads]  # the first of each warms up
    return max(size / device.seconds(read) for size, read in rounds)


def matmul_peaks(device: Device) -> dict[str, float]:
    """FLOP/s of a square matmul by dtype name; a dtype the machine only emulates gets a tiny matmul's figure.

    On a GPU "float32" is IEEE's, "tf32" is float32 on tensor cores, and dtypes that it cannot multiply are absent.
    """
    peaks = {name: _peak(device, prepare) for name, prepare in _matmuls(device).items()}
    return {name: peak for name, peak in peaks.items() if peak}


def _matmuls(device: Device) -> Mapping[str, Prepare]:
    found: dict[str, Prepare] = {"float32": _plain(torch.float32)}
    if device.asynchronous:
        found = {"float32": _with_precision("ieee"), "tf32": _with_precision("tf32")}
    found |= {"bfloat16": _plain(torch.bfloat16), "float16": _plain(torch.float16)}
    if device.asynchronous:
        found["int8"] = _int8
        if tuple(map(int, device.identity().capability.split("."))) >= FP8_CAPABILITY:
            found["float8_e4m3fn"] = _float8
    return found


def _peak(device: Device, prepare: Prepare) -> float:
    """Larger and larger matmuls, which also bring a GPU's clocks up, until one is long enough to tell."""
    peak = 0.0
    for side in SIDES:
        if 8 * side * side > device.scratch_bytes():  # an operand and the result, at float32
            break
        try:
            fastest = _fastest(device, prepare(device, side))
        except RuntimeError:  # no matmul in this dtype, or no memory for one so large
            break
        peak = max(peak, matmul_flops(side, side, side) / fastest)
        if fastest > MATMUL_S or peak < HOPELESS_FLOPS_PER_S:
            break
    return peak


def _fastest(device: Device, multiply: Multiply) -> float:
    fastest, end = math.inf, time.perf_counter() + MATMUL_LIMIT_S
    for _ in range(MATMUL_ROUNDS):
        fastest = min(fastest, device.seconds(multiply))
        if time.perf_counter() > end:
            break
    return fastest


def _operand(device: Device, side: int) -> torch.Tensor:
    """[side, side] float32. A GPU draws less power for equal numbers, and clocks higher than it will for a model's."""
    make = torch.randn if device.asynchronous else torch.ones
    return make(side, side, device=device.where)


def _plain(dtype: torch.dtype) -> Prepare:
    def prepare(device: Device, side: int) -> Multiply:
        a = _operand(device, side).to(dtype)
        return lambda: a @ a

    return prepare


def _with_precision(precision: str) -> Prepare:
    def prepare(device: Device, side: int) -> Multiply:
        a = _operand(device, side)

        def multiply() -> torch.Tensor:
            with float32_precision(precision):
                return a @ a

        return multiply

    return prepare


def _int8(device: Device, side: int) -> Multiply:
    a = _operand(device, side).mul(40).clamp(-127, 127).to(torch.int8)
    b = a.t()  # the layout that tensor cores read
    return lambda: torch._int_mm(a, b)


def _float8(device: Device, side: int) -> Multiply:
    a, one = _operand(device, side).to(torch.float8_e4m3fn), torch.ones((), dtype=torch.float32, device=device.where)
    b = a.t()  # the layout that the operator demands
    return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Within it float32 matmuls on a GPU run in "ieee" or "tf32", whatever the process has chosen."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before


def uses_tf32() -> bool:
    """Whether the process lets float32 matmuls on a GPU run on tensor cores."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
