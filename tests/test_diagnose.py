"""Each bottleneck from a phase made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.diagnose import diagnose, overhead_s
from autotune.hardware import Hardware
from autotune.profile import MemoryUse, PhaseProfile

CPU = Hardware("cpu", "a CPU", "AVX512", 2, 16 * 10**9, 34e9, {"float32": 420e9}, None, {})
H100 = Hardware("cuda", "a GPU", "9.0", 1, 80 * 10**9, 3350e9, {"float16": 989e12}, None, {})

# 538 MB of FP32 weights at 34 GB/s: a floor of 15.8 ms for 32 ms a token.
DECODE = PhaseProfile(
    phase="decode",
    samples_s=(0.032,),
    flops=0.27e9,
    weight_bytes=535e6,
    cache_bytes=3e6,
    busy=0.9,
    compute_dtype="float32",
    linear_s=0.024,
    attention_s=0.002,
    operator_count=1713,
    sync_s=0.0,
    operators=(),
    attention_flops=0.01e9,
    small_s=0.003,
)
# 512 tokens through 135 M parameters: 126 GFLOP, a floor of 300 ms for 500 ms.
PREFILL = replace(
    DECODE,
    phase="prefill",
    samples_s=(0.5,),
    flops=126e9,
    cache_bytes=24e6,
    linear_s=0.4,
    attention_s=0.03,
    small_s=0.01,
)
# One token of a 7B model: 14 GB at 3350 GB/s take 4.2 ms.
GPU = replace(
    DECODE,
    samples_s=(0.006,),
    flops=14e9,
    weight_bytes=14e9,
    cache_bytes=0.5e9,
    busy=0.95,
    compute_dtype="float16",
    linear_s=0.005,
    attention_s=0.0005,
    small_s=0.0,
)

CASES = [
    ("decode at half its bandwidth", DECODE, CPU, "memory"),
    ("slow matmuls are not overhead", replace(DECODE, samples_s=(0.100,), linear_s=0.09), CPU, "memory"),
    ("prefill at 60 % of the FLOPs", PREFILL, CPU, "compute"),
    ("gaps between operators", replace(DECODE, busy=0.35), CPU, "overhead"),
    ("many tiny operators", replace(DECODE, busy=1.0, small_s=0.022), CPU, "overhead"),
    ("half of each", replace(DECODE, busy=0.6, small_s=0.003), CPU, "mixed"),
    (
        "cache larger than the weights",
        replace(DECODE, cache_bytes=600e6, attention_s=0.018, linear_s=0.01),
        CPU,
        "kv-cache",
    ),
    ("a busy GPU", GPU, H100, "memory"),
    ("a GPU that is launched too slowly", replace(GPU, samples_s=(0.020,), busy=0.25), H100, "overhead"),
    ("a host that waits for an idle GPU", replace(GPU, samples_s=(0.020,), busy=0.5, sync_s=0.008), H100, "sync"),
    ("a host that waits for a busy GPU", replace(GPU, sync_s=0.004), H100, "memory"),
    ("weights that do not fit", replace(DECODE, weight_bytes=30e9), CPU, "capacity"),
]


@pytest.mark.parametrize(("phase", "hardware", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_bottleneck_is_named_in_the_evidence(phase: PhaseProfile, hardware: Hardware, expected: str) -> None:
    found = diagnose(phase, hardware)
    assert found.bottleneck == expected
    assert found.phase == phase.phase
    assert {"sync": "synchronisation", "mixed": "mixed", "kv-cache": "KV-cache"}.get(
        expected, expected
    ) in found.evidence


def test_evidence_is_a_sentence_with_the_numbers_that_decided() -> None:
    found = diagnose(DECODE, CPU)
    assert found.evidence == (
        "decode moves 538 MB a token at 16.8 GB/s, 49 % of the 34 GB/s measured: memory-bound; "
        "at 100 % it would be 2.0x faster"
    )
    assert found.ceiling == pytest.approx(0.032 / (538e6 / 34e9))
    assert found.roofline_share == pytest.approx(1 / found.ceiling)


def test_evidence_of_overhead_tells_how_much_and_from_what() -> None:
    found = diagnose(replace(DECODE, busy=0.35), CPU)
    assert found.evidence == (
        "decode spends 23.8 ms of 32 ms a token (74 %) between its 1713 operators and in small ones: overhead-bound; "
        "the roofline floor is 15.8 ms; at 100 % it would be 2.0x faster"
    )


@pytest.mark.parametrize("busy", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("flops", [1e9, 1e12, 1e15])
def test_an_idle_device_is_never_compute_bound(busy: float, flops: float) -> None:
    idle = replace(GPU, phase="prefill", samples_s=(1.0,), flops=flops, busy=busy)
    assert diagnose(idle, H100).bottleneck == "overhead"


@pytest.mark.parametrize(("resident", "expected"), [(10 * 10**9, "memory"), (15 * 10**9, "capacity")])
def test_capacity_counts_all_that_is_resident(resident: int, expected: str) -> None:
    memory = MemoryUse(weights_bytes=resident - 10**9, cache_bytes=9 * 10**8, activations_bytes=10**8)
    assert diagnose(DECODE, CPU, memory).bottleneck == expected


def test_a_phase_faster_than_memory_is_at_its_roof() -> None:
    found = diagnose(replace(DECODE, samples_s=(0.008,), linear_s=0.006, small_s=0.0), CPU)  # from the CPU's caches
    assert found.roofline_share <= 1.0
    assert found.ceiling >= 1.0


def test_overhead_is_the_gaps_and_the_small_operators() -> None:
    assert overhead_s(DECODE) == pytest.approx(0.032 * 0.1 + 0.003)
