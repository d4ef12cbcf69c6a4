"""The roofline formulas against cases computed by hand."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import pytest

from autotune.diagnose import ceilings
from autotune.diagnose.costs import Operator, PhaseProfile
from autotune.diagnose.parts import CACHE
from autotune.machine import roofline
from autotune.machine.hardware import Hardware

GIB = 2**30
CPU = Hardware("cpu", "a CPU", "AVX2", 2, 16 * GIB, 25e9, {"float32": 140e9, "bfloat16": 0.15e9}, None, {})

# 40 ms a token: 24 in matmuls over 500 MB (20.8 of 25 GB/s), 4 in attention, 12 elsewhere.
DECODE = PhaseProfile(
    phase="decode",
    samples_s=(0.040,),
    flops=0.27e9,
    weight_bytes=500e6,
    cache_bytes=5e6,
    busy=0.8,
    compute_dtype="float32",
    linear_s=0.024,
    attention_s=0.004,
    operator_count=1700,
    sync_s=0.0,
    operators=(),
    attention_flops=0.02e9,
    small_s=0.004,
)


@pytest.mark.parametrize(("m", "n", "k", "flops"), [(1, 4096, 4096, 33_554_432), (2, 3, 5, 60)])
def test_one_matmul(m: int, n: int, k: int, flops: int) -> None:
    assert roofline.matmul_flops(m, n, k) == flops


@pytest.mark.parametrize(
    ("flops", "moved", "intensity", "bound"),
    [
        (33_554_432, 33_570_816, 0.9995, "memory"),  # a vector times a matrix of 4096^2 in 16 bits, each read once
        (137_438_953_472, 100_663_296, 1365.3, "compute"),  # two such matrices: 3 * 4096^2 * 2 bytes
    ],
)
def test_what_bounds_a_matmul_on_an_h100(flops: int, moved: int, intensity: float, bound: str) -> None:
    ridge = roofline.ridge(989e12, 3350e9)
    assert ridge == pytest.approx(295.2, abs=0.1)
    assert roofline.intensity(flops, moved) == pytest.approx(intensity, rel=1e-4)
    assert roofline.classify(roofline.intensity(flops, moved), ridge) == bound


def test_the_longer_of_computing_and_moving_is_the_floor() -> None:
    floor = roofline.floor_s(33_554_432, 33_570_816, 989e12, 3350e9)
    assert floor == pytest.approx(10.02e-6, rel=1e-3)  # 33.6 MB / 3350 GB/s; the FLOPs alone take 34 ns


@pytest.mark.parametrize(
    ("tokens", "layers", "kv_heads", "head_size", "element", "expected"),
    [
        (4096, 32, 32, 128, 2, 2 * GIB),  # Llama-2-7B, FP16, every head its own keys
        (8192, 32, 8, 128, 2, 1 * GIB),  # Llama-3-8B: 8 KV heads for 32 query heads
        (8192, 32, 32, 128, 2, 4 * GIB),  # the same without grouping
        (8192, 32, 8, 128, 1, GIB / 2),  # the same in 8 bits
        (1, 30, 3, 64, 4, 46_080),  # SmolLM2-135M, FP32, one token
        (0, 32, 32, 128, 2, 0),
    ],
)
def test_size_of_the_cache(
    tokens: int, layers: int, kv_heads: int, head_size: int, element: float, expected: float
) -> None:
    assert roofline.kv_cache_bytes(tokens, layers, kv_heads, head_size, element) == expected


@pytest.mark.parametrize(
    ("capability", "dtype", "peak"),
    [
        ("AVX2", "float32", 140e9),
        ("AVX2", "bfloat16", 0.15e9),
        ("AVX2", "float16", 140e9),
        ("AVX2", "int16", 210e9),
        ("AVX2", "int8", 308e9),
        ("AVX512", "int16", 210e9),
        ("AVX512", "int8", 560e9),
        ("NEON", "int16", 140e9),
        ("AVX2", "bfloat16x3", 0.05e9),
        ("NEON", "int8", 560e9),
    ],
)
def test_a_peak_that_was_not_measured_is_a_generous_one(capability: str, dtype: str, peak: float) -> None:
    assert replace(CPU, capability=capability).peak_flops_per_s(dtype) == pytest.approx(peak)


@pytest.mark.parametrize(
    ("measured", "dtype", "peak"),
    [
        ({"float32": 50e12, "bfloat16": 700e12, "float16": 650e12}, "tf32", 350e12),  # half of the 16-bit peak
        ({"float32": 50e12, "bfloat16": 60e12}, "tf32", 50e12),  # without tensor cores
        ({"float32": 50e12}, "tf32", 50e12),
        ({"tf32": 400e12, "bfloat16": 700e12}, "float32", 400e12),  # at most as fast as on tensor cores
        ({"tf32": 400e12, "bfloat16": 700e12}, "tf32", 400e12),
        ({"tf32": 400e12, "bfloat16": 700e12}, "int8", 1400e12),
    ],
)
def test_the_precision_that_a_gpu_s_process_does_not_compute_in_is_bounded(
    measured: dict[str, float], dtype: str, peak: float
) -> None:
    assert replace(CPU, device="cuda", capability="9.0", flops_per_s=measured).peak_flops_per_s(dtype) == peak


def test_nothing_moves_nothing_limits() -> None:
    assert roofline.intensity(1.0, 0.0) == float("inf")


@pytest.mark.parametrize(
    ("new_bytes", "dtype", "after_s"),
    [
        (500e6, None, 0.016 + 0.020),  # a perfect kernel for the same bytes: 500 MB at 25 GB/s
        (250e6, None, 0.016 + 0.010),  # FP16
        (125e6, None, 0.016 + 0.005),  # INT8
        (0.0, None, 0.016 + 0.25e9 / 140e9),  # the FLOPs remain
        (900e6, None, 0.040),  # more bytes at the old speed are no reason to predict a loss
        (250e6, "bfloat16", 0.016 + 0.25 / 0.15),  # a dtype that this machine emulates must be slower
        (250e6, "int8", 0.016 + 0.010),  # its FLOPs are no limit
    ],
)
def test_smaller_weights(new_bytes: float, dtype: str | None, after_s: float) -> None:
    speedup = ceilings.faster_weights(DECODE, CPU, new_bytes, compute_dtype=dtype)
    assert speedup == pytest.approx(0.040 / after_s)


def test_a_phase_that_lives_in_the_cpu_cache_may_beat_the_memory() -> None:
    cached = replace(DECODE, linear_s=0.010)  # 50 GB/s on a machine that reads 25 from memory
    assert ceilings.attainable_bandwidth(cached, CPU) == pytest.approx(50e9)
    assert ceilings.faster_weights(cached, CPU, 250e6) == pytest.approx(0.040 / 0.035)


GPU = Hardware("cuda", "a GPU", "9.0", 2, 80 * GIB, 2e12, {"bfloat16": 400e12}, None, {})
# 13 ms a token, in 12 of which the GPU works. 16 GB of weights take at least 8 of them.
ON_GPU = replace(
    DECODE,
    samples_s=(0.013,),
    flops=16e9,
    attention_flops=0.0,
    weight_bytes=16e9,
    cache_bytes=0.0,
    busy=12 / 13,
    compute_dtype="bfloat16",
    linear_s=0.010,
    attention_s=0.001,
    small_s=0.0,
)


@pytest.mark.parametrize(
    ("phase", "recognised_s", "taken_s"),
    [
        (ON_GPU, 0.010, 0.010),
        (ON_GPU, 0.003, 0.008),  # as if the memory were read at 5.3 TB/s
        (ON_GPU, 0.0, 0.008),
        (replace(ON_GPU, busy=7 / 13), 0.003, 0.006),  # it cannot be more than the GPU worked beside attention
    ],
)
def test_matmuls_on_a_gpu_that_were_not_recognised_count(
    phase: PhaseProfile, recognised_s: float, taken_s: float
) -> None:
    phase = replace(phase, linear_s=recognised_s)
    assert ceilings.matmul_s(phase, GPU) == pytest.approx(taken_s)
    left_s = min(0.002, taken_s / 4)  # of a quarter of the bytes
    assert ceilings.faster_weights(phase, GPU, 4e9) == pytest.approx(0.013 / (0.013 - taken_s + left_s))
    assert ceilings.less_overhead(phase, GPU) == pytest.approx(0.013 / (taken_s + 0.001))


@pytest.mark.parametrize(
    ("new_kernels", "after_s"),
    [
        (False, 0.028),  # matmuls and attention stay as they are
        (True, 505e6 / 25e9),  # all that is left is the roofline
    ],
)
def test_less_overhead(new_kernels: bool, after_s: float) -> None:
    assert ceilings.less_overhead(DECODE, CPU, new_kernels=new_kernels) == pytest.approx(0.040 / after_s)


@pytest.mark.parametrize(
    ("dtype", "after_s"),
    [(None, 0.27 / 0.15), ("float32", 505e6 / 25e9)],  # emulated, nothing gets it below; in FP32 the bytes are left
)
def test_less_overhead_in_another_arithmetic(dtype: str | None, after_s: float) -> None:
    emulated = replace(DECODE, compute_dtype="bfloat16", samples_s=(4.0,), linear_s=3.0)
    found = ceilings.less_overhead(emulated, CPU, new_kernels=True, compute_dtype=dtype)
    assert found == pytest.approx(4.0 / after_s)


LIBRARY = replace(CPU, vector_bytes_per_s={"float32": 20e9, "float16": 10e9})


@pytest.mark.parametrize(
    ("phase", "hardware", "dtype", "after_s"),
    [
        (DECODE, LIBRARY, "float16", 0.040),  # half the bytes at half the rate: nothing is gained
        (DECODE, replace(LIBRARY, vector_bytes_per_s={"float32": 20e9, "float16": 20e9}), "float16", 0.028),
        (DECODE, replace(LIBRARY, vector_bytes_per_s={"float32": 5e9, "float16": 40e9}), "float16", 0.026),  # memory's
        (DECODE, CPU, "float16", 0.026),
        (DECODE, LIBRARY, "bfloat16", 0.040 - 0.024 + 0.25 / 0.15),  # emulated
    ],
)
def test_weights_that_torch_s_own_kernels_read(
    phase: PhaseProfile, hardware: Hardware, dtype: str, after_s: float
) -> None:
    assert ceilings.faster_rows(phase, hardware, 250e6, dtype) == pytest.approx(0.040 / after_s)


@pytest.mark.parametrize(
    ("hardware", "matmuls", "after_s"),
    [
        (CPU, 0, 0.028),
        (CPU, 1000, 0.034),  # as many generated kernels between them, 3 us each
        (CPU, 9000, 0.040),  # but it is not predicted to be slower
        (replace(CPU, device="cuda"), 1000, 0.028),  # the device computes while the host calls
    ],
)
def test_a_compiled_graph_calls_its_kernels(hardware: Hardware, matmuls: int, after_s: float) -> None:
    found = ceilings.compiled(replace(DECODE, matmul_count=matmuls), hardware)
    assert found == pytest.approx(0.040 / after_s)


@pytest.mark.parametrize(
    ("loop_s", "also", "after_s"),
    [
        (0.004, (), 0.036),
        (0.004, (CACHE,), 0.034),
        (0.020, (), 0.028),  # what matmuls and attention take stays
        (nan, (CACHE,), 0.028),  # not known: all the time between operators
    ],
)
def test_a_shorter_loop(loop_s: float, also: tuple[str, ...], after_s: float) -> None:
    written = Operator(CACHE, 0.002, 0, 5e6, "memory")
    found = ceilings.shorter_loop(replace(DECODE, loop_s=loop_s, operators=(written,)), CPU, also)
    assert found == pytest.approx(0.040 / after_s)


def test_faster_attention() -> None:
    # 5 MB at 25 GB/s take 0.2 ms, 0.02 GFLOP at 140 GFLOP/s take 0.14 ms; attention takes 4 ms now, what is around it 3
    assert ceilings.faster_attention(DECODE, CPU) == pytest.approx(0.040 / (0.036 + 0.0002))
    repeating = replace(DECODE, around_attention_s=0.003)
    assert ceilings.faster_attention(repeating, CPU) == pytest.approx(0.040 / (0.033 + 0.0002))


@pytest.mark.parametrize("seconds", [0.001, 0.010, 0.020])
def test_a_phase_at_its_floor_is_never_predicted_to_slow_down(seconds: float) -> None:
    at_floor = replace(DECODE, samples_s=(seconds,), linear_s=0.8 * seconds, attention_s=0.1 * seconds)
    assert ceilings.faster_weights(at_floor, CPU, at_floor.weight_bytes) == pytest.approx(1.0)
    assert ceilings.less_overhead(at_floor, CPU) >= 1.0
    assert ceilings.less_overhead(at_floor, CPU, new_kernels=True) >= 1.0
    assert ceilings.faster_attention(at_floor, CPU) >= 1.0
