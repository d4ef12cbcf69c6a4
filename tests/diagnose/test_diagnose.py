"""Each bottleneck from a phase made by hand."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import Any

import pytest

from autotune.diagnose.costs import DeviceUse, MemoryUse, PhaseProfile
from autotune.diagnose.diagnosis import diagnose, overhead_s
from autotune.machine.device.counters import Counters
from autotune.machine.hardware import Hardware

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

GPU_PREFILL = replace(
    GPU, phase="prefill", samples_s=(0.1,), flops=60e12, cache_bytes=0.3e9, busy=0.98, linear_s=0.08, attention_s=0.012
)


def used(phase: PhaseProfile, busy: float, launches: int = 300, late: float = 0.1, **more: Any) -> PhaseProfile:
    """The phase with a device that works for a share `busy` of the time."""
    idle_s = (1 - busy) * phase.seconds
    device = DeviceUse(busy * phase.seconds, launches, launches, idle_s, late * idle_s, late, 0.0)
    fields = {f.name for f in dataclass_fields(DeviceUse)}
    device = replace(device, **{name: value for name, value in more.items() if name in fields})
    return replace(phase, busy=busy, device=device, **{n: v for n, v in more.items() if n not in fields})


SLOW = replace(GPU, samples_s=(0.0091,))
LONG = replace(GPU, samples_s=(0.011,), cache_bytes=20e9, attention_s=0.006, linear_s=0.0045)
PATTERNS = [  # the five of a GPU, and capacity
    ("decode reads its weights", used(GPU, 0.95), "memory", "2.42 TB/s, 72 % of the 3.35 TB/s measured"),
    ("weights at half the bandwidth", used(SLOW, 0.93), "memory", "memory-bound; at 100 % it would be 2.1x faster"),
    (
        "prefill multiplies",
        used(GPU_PREFILL, 0.98),
        "compute",
        "computes 60 TFLOP a call at 600 TFLOP/s, 61 % of the 989 TFLOP/s measured for float16",
    ),
    ("prefill that idles", used(GPU_PREFILL, 0.3, late=0.9), "overhead", "idles 70 % of 100 ms"),
    ("more cache than weights", used(LONG, 0.96), "kv-cache", "59 % of it KV cache"),
    ("grows with the context", used(GPU, 0.95, growth_s=0.004), "kv-cache", "4 ms of 6 ms growing with the context"),
    ("grows a little", used(GPU, 0.95, growth_s=0.002), "memory", "memory-bound"),
    ("short kernels", used(SLOW, 0.39, 812, 0.74), "overhead", "launches 812 kernels a token; the device idles 61 %"),
    (
        "one graph of short kernels",
        used(SLOW, 0.9, 1, kernel_count=812, graph_launches=1, small_s=0.006),
        "overhead",
        "launches 812 kernels as 1 graph a token",
    ),
    (
        "a graph between kernels",
        used(SLOW, 0.3, 40, kernel_count=812, graph_launches=1),
        "overhead",
        "launches 812 kernels, in 40 launches with graphs among them, a token",
    ),
    ("idle for half", used(SLOW, 0.5, 812, 0.9), "mixed", "in 90 % of the gaps it waits for the host: mixed"),
    ("waits inside each token", used(SLOW, 0.6, sync_s=0.003), "sync", "waits for the device 3 ms of 9.1 ms"),
    ("waits for what it needs", used(SLOW, 0.95, sync_s=0.008), "memory", "memory-bound"),
    ("offloaded weights", used(SLOW, 0.95, copy_s=0.006), "sync", "for 6 ms nothing but copies to or from the host"),
    ("a few copies", used(SLOW, 0.95, copy_s=0.0005), "memory", "memory-bound"),
    ("too large", used(replace(GPU, weight_bytes=140e9), 0.95), "capacity", "capacity-bound"),
]


@pytest.mark.parametrize(("phase", "expected", "said"), [p[1:] for p in PATTERNS], ids=[p[0] for p in PATTERNS])
def test_every_pattern_of_a_gpu_is_recognised(phase: PhaseProfile, expected: str, said: str) -> None:
    found = diagnose(phase, H100)
    assert found.bottleneck == expected
    assert said in found.evidence


def test_evidence_of_a_gpu_that_waits_for_its_host() -> None:
    assert diagnose(used(SLOW, 0.39, 812, 0.74), H100).evidence == (
        "decode launches 812 kernels a token; the device idles 61 % of 9.1 ms, in 74 % of the gaps it waits for the "
        "host: overhead-bound; the roofline floor is 4.33 ms; at 100 % it would be 2.1x faster"
    )


GPM = Counters(sm_active=0.38, tensor_active=0.02, dram_active=0.45)
NVML = Counters(sm_utilization=1.0, memory_utilization=0.3)
TOLD = [
    (GPM, "(GPM counts SMs active 38 %, tensor cores 2 %, DRAM 45 %)"),
    (NVML, "(NVML saw a kernel running 100 % of the time, memory 30 %)"),
    (Counters(sm_utilization=0.5), "(NVML saw a kernel running 50 % of the time)"),
    (Counters(), "faster"),
    (None, "faster"),
]


@pytest.mark.parametrize(("counters", "end"), TOLD)
@pytest.mark.parametrize("busy", [0.95, 0.2])
def test_counters_are_told_and_decide_nothing(counters: Counters | None, end: str, busy: float) -> None:
    without = diagnose(used(GPU, busy), H100)
    found = diagnose(used(GPU, busy, counters=counters), H100)
    assert found.bottleneck == without.bottleneck
    assert found.evidence.endswith(end)


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


def test_a_peak_that_was_not_measured_is_told_as_a_bound() -> None:
    prefill = replace(DECODE, phase="prefill", samples_s=(1.0,), flops=280e9, weight_bytes=1e6, linear_s=0.9)
    prefill = replace(prefill, compute_dtype="int8")
    assert diagnose(prefill, CPU).evidence == (
        "prefill computes 280 GFLOP a call at 280 GFLOP/s, 17 % of at most 1.68 TFLOP/s for int8: compute-bound; "
        "at 100 % it would be 6.0x faster"
    )


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


@pytest.mark.parametrize(("stored", "expected"), [(10 * 10**9, "memory"), (14 * 10**9, "capacity")])
def test_capacity_counts_weights_cache_and_activations(stored: int, expected: str) -> None:
    memory = MemoryUse(weights_bytes=stored, cache_bytes=9 * 10**8, activations_bytes=10**8)
    assert diagnose(replace(DECODE, stored_bytes=stored), CPU, memory).bottleneck == expected


def test_the_original_beside_a_plan_takes_no_room_from_its_phases() -> None:
    """8 billion parameters in BF16 (16.1 GB), served with 4 bits each (5 GB), on a card of 24 GB."""
    card, memory = replace(H100, memory_bytes=24 * 10**9), MemoryUse(21_100_000_000, 500_000_000, 300_000_000)
    assert diagnose(replace(GPU, weight_bytes=4.7e9, stored_bytes=5e9), card, memory).bottleneck == "memory"


def test_a_phase_faster_than_memory_is_at_its_roof() -> None:
    found = diagnose(replace(DECODE, samples_s=(0.008,), linear_s=0.006, small_s=0.0), CPU)  # from the CPU's caches
    assert found.roofline_share <= 1.0
    assert found.ceiling >= 1.0


def test_overhead_is_the_gaps_and_the_small_operators() -> None:
    assert overhead_s(DECODE) == pytest.approx(0.032 * 0.1 + 0.003)


# FLOPs of a call that moves 538 MB, where the ridge lies at 12.4 FLOPs a byte -> found, and what it may be
RIDGES = [
    (538e6 * 0.1, "memory", ()),
    (538e6 * 5.0, "memory", ("compute",)),
    (538e6 * 20.0, "compute", ("memory",)),
    (538e6 * 2000.0, "compute", ()),
]


@pytest.mark.parametrize(("flops", "found", "perhaps"), RIDGES)
def test_near_the_ridge_disturbed_peaks_leave_open_what_bounds(flops: float, found: str, perhaps: tuple[str]) -> None:
    phase = replace(DECODE, flops=flops)
    quiet, disturbed = diagnose(phase, CPU), diagnose(phase, replace(CPU, disturbed=True))
    assert (quiet.bottleneck, quiet.perhaps) == (found, ())
    assert (disturbed.bottleneck, disturbed.perhaps) == (found, perhaps)
    said = f" (others disturbed the measured peaks: perhaps {perhaps[0]}-bound)" if perhaps else ""
    assert disturbed.evidence == quiet.evidence + said


def test_what_no_peak_decides_is_as_sure_as_ever() -> None:
    idle = replace(DECODE, busy=0.2)
    assert diagnose(idle, replace(CPU, disturbed=True)) == diagnose(idle, CPU)
