"""Upper bounds on what a transform can gain, by the roofline model. Pure.

These predictions decide what is worth trying, so they must be ceilings: time that a transform does not affect stays as
measured, and time that it does affect shrinks to its floor. A speed-up below 1 is predicted only if the new form of the
work has a floor above the time measured now.
"""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING

from ..machine.roofline import floor_s

if TYPE_CHECKING:
    from ..machine.hardware import Hardware
    from .costs import PhaseProfile

# Seconds of a call from a compiled graph's Python to a kernel on a CPU, with the start of a team of threads: at least
# this. SmolLM2-135M's compiled step, 241 matmuls and attentions over INT8 weights, takes 1.6 ms more than they do.
CALL_S = 3e-6


def matmul_s(phase: PhaseProfile, hardware: Hardware) -> float:
    """Return the seconds of a phase in matmuls over weights; on a GPU at least what reading the weights takes.

    A GPU's caches hold little of a model's weights. If matmuls seem faster than its memory, some of their kernels were
    not recognised by name, and the time of reading is nearer to the truth.
    """
    if hardware.device == "cpu":
        return phase.linear_s
    working_s = phase.busy * phase.seconds - phase.attention_s
    return max(phase.linear_s, min(phase.weight_bytes / hardware.bandwidth_bytes_per_s, working_s))


def attainable_bandwidth(phase: PhaseProfile, hardware: Hardware) -> float:
    """Return the bytes/s to predict with: the measured bandwidth, or the phase's own rate if caches make it higher."""
    return max(hardware.bandwidth_bytes_per_s, _rate(phase.weight_bytes, matmul_s(phase, hardware)))


def attainable_peak(phase: PhaseProfile, hardware: Hardware, dtype: str | None = None) -> float:
    """Return the FLOP/s to predict with in `dtype`; in the phase's own dtype, at least what its matmuls reach now."""
    peak = hardware.peak_flops_per_s(dtype or phase.compute_dtype)
    if dtype in (None, phase.compute_dtype):
        return max(peak, _rate(phase.flops - phase.attention_flops, matmul_s(phase, hardware)))
    return peak


def roofline_s(phase: PhaseProfile, hardware: Hardware, compute_dtype: str | None = None) -> float:
    """Return the floor of a call (prefill) or token (decode) with its present bytes and FLOPs; None: its own dtype."""
    peak = attainable_peak(phase, hardware, compute_dtype)
    return floor_s(phase.flops, phase.moved_bytes, peak, attainable_bandwidth(phase, hardware))


def faster_weights(
    phase: PhaseProfile, hardware: Hardware, new_weight_bytes: float, *, compute_dtype: str | None = None
) -> float:
    """Return the best-case speed-up of a phase if its weights take `new_weight_bytes`.

    Time outside the matmuls over weights stays. Time inside them shrinks to the floor of the new bytes or of the FLOPs,
    whichever is longer. So a kernel that is slow for its bytes today is assumed to be replaced by a perfect one.

    Args:
        phase: the phase as measured now.
        hardware: measured peaks.
        new_weight_bytes: weight bytes that would move per call or token (compare `phase.weight_bytes`).
        compute_dtype: dtype the new matmuls compute in; None keeps the present one. The result is below 1.0 only if
            this dtype's peak makes the matmuls longer than they are now.
    """
    flops_s = (phase.flops - phase.attention_flops) / attainable_peak(phase, hardware, compute_dtype)
    now_s = matmul_s(phase, hardware)
    bytes_s = min(new_weight_bytes / attainable_bandwidth(phase, hardware), now_s)
    return _speedup(phase.seconds, phase.seconds - now_s + max(flops_s, bytes_s))


def faster_rows(phase: PhaseProfile, hardware: Hardware, new_weight_bytes: float, compute_dtype: str) -> float:
    """Return the best-case speed-up of decode if torch's own kernels multiply one row by weights of another dtype.

    As `faster_weights`, but in the new dtype they are expected to reach the share of what they reach on large matrices
    (`Hardware.vector_bytes_per_s`, where it is known) that they reach in the present one.
    """
    best = faster_weights(phase, hardware, new_weight_bytes, compute_dtype=compute_dtype)
    rates, now_s = hardware.vector_bytes_per_s, matmul_s(phase, hardware)
    if not {phase.compute_dtype, compute_dtype} <= rates.keys():
        return best
    pace = rates[phase.compute_dtype] / rates[compute_dtype]
    bytes_s = min(now_s * pace * new_weight_bytes / phase.weight_bytes, now_s)
    return min(best, _speedup(phase.seconds, phase.seconds - now_s + bytes_s))


def less_overhead(
    phase: PhaseProfile, hardware: Hardware, *, new_kernels: bool = False, compute_dtype: str | None = None
) -> float:
    """Return the best-case speed-up of a phase if the time between operators and in small ones disappears.

    Args:
        phase: the phase as measured now.
        hardware: measured peaks.
        new_kernels: whether a compiler replaces the matmuls and attention, too, so that they shrink to their floor.
        compute_dtype: dtype that the new kernels compute in; None keeps the present one.
    """
    floor = min(roofline_s(phase, hardware, compute_dtype), phase.seconds)
    kept = 0.0 if new_kernels else matmul_s(phase, hardware) + phase.attention_s
    return _speedup(phase.seconds, max(kept, floor))


def compiled(phase: PhaseProfile, hardware: Hardware) -> float:
    """Return the best-case speed-up of a phase as a compiled graph.

    As `less_overhead`, but on a CPU the graph calls each matmul and attention from Python, and one generated kernel
    between every two of them.
    """
    gain = less_overhead(phase, hardware)
    if hardware.device != "cpu":
        return gain
    return _speedup(phase.seconds, min(phase.seconds / gain + 2 * phase.matmul_count * CALL_S, phase.seconds))


def shorter_loop(phase: PhaseProfile, hardware: Hardware, also: tuple[str, ...] = ()) -> float:
    """Return the best-case speed-up of a phase if the time outside the model's forward disappears.

    Args:
        phase: the phase as measured now.
        hardware: measured peaks.
        also: groups of the operator table whose time disappears, too.
    """
    most = less_overhead(phase, hardware)
    if isnan(phase.loop_s):
        return most
    saved = phase.loop_s + sum(row.seconds for row in phase.operators if row.group in also)
    return min(most, _speedup(phase.seconds, phase.seconds - min(saved, phase.seconds)))


def fewer_threads(phase: PhaseProfile, hardware: Hardware, threads: int, saved_s: float) -> float:
    """Return the best-case speed-up of a phase by fewer threads on a CPU.

    Args:
        phase: the phase as measured now, with `hardware.threads`.
        hardware: measured peaks.
        threads: the new number.
        saved_s: seconds that starting and joining threads takes now; of the phase's time, at most half counts.
    """
    after_s, now_s = max(phase.seconds - saved_s, phase.seconds / 2), matmul_s(phase, hardware)
    from_caches = _rate(phase.weight_bytes, now_s) > hardware.bandwidth_bytes_per_s
    if not from_caches and not isnan(hardware.core_bytes_per_s):  # how fast a core computes alone is not known
        after_s += max(0.0, phase.weight_bytes / (threads * hardware.core_bytes_per_s) - now_s)
    return _speedup(phase.seconds, after_s)


def faster_attention(phase: PhaseProfile, hardware: Hardware, compute_dtype: str | None = None) -> float:
    """Return the best-case speed-up of a phase if attention shrinks to its floor: its FLOPs, or its cache read once.

    The work around attention proper shrinks with it (`PhaseProfile.around_attention_s`): a better kernel may take
    unrepeated keys, apply its mask itself, or write the cache. Projections stay.

    Args:
        compute_dtype: of attention's products, a key into `Hardware.flops_per_s`; None: the phase's.
    """
    peak, bandwidth = attainable_peak(phase, hardware, compute_dtype), attainable_bandwidth(phase, hardware)
    floor = floor_s(phase.attention_flops, phase.cache_bytes, peak, bandwidth)
    touched = phase.attention_s + phase.around_attention_s
    return _speedup(phase.seconds, phase.seconds - touched + min(floor, touched))


def narrower_cache(phase: PhaseProfile, share: float) -> float:
    """Return the best-case speed-up of a phase if the KV cache takes `share` of its bytes: so does attention's time."""
    return _speedup(phase.seconds, phase.seconds - (1 - min(share, 1.0)) * phase.attention_s)


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _speedup(before_s: float, after_s: float) -> float:
    return before_s / after_s if after_s > 0 else float("inf")
