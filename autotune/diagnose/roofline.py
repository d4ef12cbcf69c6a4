"""What must be done, and how fast it could be done: pure formulas of the roofline model.

Every operand is counted once, and every term is defined once, here. Source: Williams, Waterman and Patterson,
"Roofline: an insightful visual performance model", CACM 52(4), 2009.

The second half predicts what a transform could gain at best. These figures decide what is worth trying, so they are
ceilings: time that a transform does not touch stays as measured, time that it does touch shrinks to its floor. A
speed-up below 1 is predicted only where the new form of the work has a floor above the time measured now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ..machine.hardware import Hardware
    from ..profile import PhaseProfile


def matmul_flops(m: int, n: int, k: int) -> int:
    """FLOPs of [m, k] x [k, n]: one multiplication and one addition per term."""
    return 2 * m * n * k


def matmul_bytes(m: int, n: int, k: int, bytes_per_element: float) -> float:
    """Bytes of [m, k] x [k, n]: both operands read once, the result written once."""
    return (m * k + k * n + m * n) * bytes_per_element


def intensity(flops: float, moved_bytes: float) -> float:
    """Arithmetic intensity, FLOPs per byte; infinite where nothing moves."""
    return flops / moved_bytes if moved_bytes else float("inf")


def ridge(peak_flops_per_s: float, bandwidth_bytes_per_s: float) -> float:
    """The intensity, FLOPs per byte, above which a machine computes longer than it moves."""
    return peak_flops_per_s / bandwidth_bytes_per_s


def classify(intensity: float, ridge: float) -> Literal["compute", "memory"]:
    """Which of the two floors is the higher one."""
    return "compute" if intensity > ridge else "memory"


def floor_s(flops: float, moved_bytes: float, peak: float, bandwidth: float) -> float:
    """Shortest possible time: computing and moving overlap, the longer of the two remains.

    Args:
        flops: floating-point operations to be done.
        moved_bytes: bytes to be moved.
        peak: FLOP/s.
        bandwidth: bytes/s.
    """
    return max(flops / peak, moved_bytes / bandwidth)


def kv_cache_bytes(tokens: int, layers: int, kv_heads: int, head_size: int, bytes_per_element: float) -> float:
    """Bytes of the keys and values of `tokens` tokens. Grouped-query attention has fewer `kv_heads` than heads."""
    return 2 * tokens * layers * kv_heads * head_size * bytes_per_element


def peak_flops_per_s(hardware: Hardware, dtype: str) -> float:
    """The matmul peak of `dtype`. One that was not measured gets the best there could be, as befits a ceiling.

    That is the best known peak, or for 8-bit numbers four times FP32's where that is more: four fit where one did. A
    GPU's tensor cores do twice as many of 8 bits as of 16 (NVIDIA's datasheets, Ampere to Blackwell).
    """
    if dtype in hardware.flops_per_s:
        return hardware.flops_per_s[dtype]
    best = max(hardware.flops_per_s.values())
    if dtype not in ("int8", "float8"):
        return best
    halves = [hardware.flops_per_s.get(name, 0.0) for name in ("bfloat16", "float16")]
    return max(best, 4 * hardware.flops_per_s.get("float32", 0.0), 2 * max(halves) if hardware.device == "cuda" else 0)


def attainable_bandwidth(phase: PhaseProfile, hardware: Hardware) -> float:
    """Bytes/s to predict with: the measured bandwidth, or what the phase already reaches where caches give more."""
    return max(hardware.bandwidth_bytes_per_s, _rate(phase.weight_bytes, phase.linear_s))


def attainable_peak(phase: PhaseProfile, hardware: Hardware, dtype: str | None = None) -> float:
    """FLOP/s to predict with in `dtype`; in the phase's own dtype at least what its matmuls already reach."""
    peak = peak_flops_per_s(hardware, dtype or phase.compute_dtype)
    if dtype in (None, phase.compute_dtype):
        return max(peak, _rate(phase.flops - phase.attention_flops, phase.linear_s))
    return peak


def roofline_s(phase: PhaseProfile, hardware: Hardware, compute_dtype: str | None = None) -> float:
    """Floor of a whole call (prefill) or token (decode) with its present bytes and FLOPs; None: its own dtype."""
    peak = attainable_peak(phase, hardware, compute_dtype)
    return floor_s(phase.flops, phase.moved_bytes, peak, attainable_bandwidth(phase, hardware))


def faster_weights(
    phase: PhaseProfile, hardware: Hardware, new_weight_bytes: float, *, compute_dtype: str | None = None
) -> float:
    """Best-case speed-up of a phase when its weights take `new_weight_bytes`.

    Time outside the matmuls over weights stays; inside it shrinks to the floor of the new bytes, or of the FLOPs
    where that is longer. So a kernel that is slow for its bytes today is assumed to be replaced by a perfect one.

    Args:
        phase: the phase as measured now.
        hardware: measured peaks.
        new_weight_bytes: weight bytes that would move per call or token (compare `phase.weight_bytes`).
        compute_dtype: dtype the new matmuls compute in; None keeps the present one. Below 1.0 is returned only where
            this dtype's peak makes the matmuls longer than they are now.
    """
    flops_s = (phase.flops - phase.attention_flops) / attainable_peak(phase, hardware, compute_dtype)
    bytes_s = min(new_weight_bytes / attainable_bandwidth(phase, hardware), phase.linear_s)
    return _speedup(phase.seconds, phase.seconds - phase.linear_s + max(flops_s, bytes_s))


def less_overhead(
    phase: PhaseProfile, hardware: Hardware, *, new_kernels: bool = False, compute_dtype: str | None = None
) -> float:
    """Best-case speed-up of a phase when the time between operators and in small ones disappears.

    Args:
        phase: the phase as measured now.
        hardware: measured peaks.
        new_kernels: the matmuls are replaced, too (a compiler that generates its own), and shrink to their floor.
        compute_dtype: dtype that the new kernels compute in; None keeps the present one.
    """
    floor = min(roofline_s(phase, hardware, compute_dtype), phase.seconds)
    kept = 0.0 if new_kernels else phase.linear_s + phase.attention_s
    return _speedup(phase.seconds, max(kept, floor))


def faster_attention(phase: PhaseProfile, hardware: Hardware) -> float:
    """Best-case speed-up of a phase when attention shrinks to its floor: its FLOPs, or its cache read once.

    What surrounds attention proper shrinks with it (`PhaseProfile.around_attention_s`): a better kernel may take keys
    unrepeated, apply its mask itself, or write the cache. Projections stay.
    """
    peak, bandwidth = attainable_peak(phase, hardware), attainable_bandwidth(phase, hardware)
    floor = floor_s(phase.attention_flops, phase.cache_bytes, peak, bandwidth)
    touched = phase.attention_s + phase.around_attention_s
    return _speedup(phase.seconds, phase.seconds - touched + min(floor, touched))


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _speedup(before_s: float, after_s: float) -> float:
    return before_s / after_s if after_s > 0 else float("inf")
