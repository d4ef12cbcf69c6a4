"""Turn a profile into a verdict: what limits each phase, the evidence, and how much faster it could become.

The time T of a call or token is divided by where it is spent, and the larger part names the bottleneck:

    overhead   between operators, and in operators so small that their start costs more than their work; on a GPU: it
               idles between kernels, in most gaps because the host had not launched the next one yet
    sync       the host waits while the device is idle, or both wait for copies between them
    the rest   in operators that do real work: compute-, memory- or KV-cache-bound, whichever floor is the highest; the
               KV cache if it is the larger part of the bytes, or if most of a token's time grows with the context

A matmul that is slow for its bytes is memory-bound with a low efficiency, not overhead: a better kernel or fewer bytes
help, fewer operators do not. A device that is idle is never called compute-bound.

A GPU's counters are reported beside the verdict and never decide it: "100 % utilisation" means that some kernel ran.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..machine.roofline import classify, intensity, ridge
from ..workload import Phase
from .ceilings import roofline_s

if TYPE_CHECKING:
    from ..machine.hardware import Hardware
    from .costs import DeviceUse, MemoryUse, PhaseProfile

Bottleneck = Literal["compute", "memory", "kv-cache", "overhead", "sync", "capacity", "mixed"]

DOMINANT = 0.6  # share of the time that decides: removing all of the rest would gain less than 1 / 0.6 = 1.67x
GROWING = 0.5  # share of a token's time that grows with the context; above it, the cache outweighs all of the rest
LARGE_SYNC = 0.2  # share of the time that is waiting or copying; above it, no kernel could gain as much
FULL = 0.9  # usable share of the memory; allocator slack and the host need the rest
UNITS = {"prefill": "a call", "decode": "a token"}


@dataclass(frozen=True)
class Diagnosis:
    """What limits one phase.

    Args:
        phase: "prefill" or "decode".
        bottleneck: the dominant limit.
        evidence: one sentence with the decisive numbers.
        ceiling: the phase's highest possible speed-up with its present bytes and FLOPs.
        roofline_share: roofline floor / measured time, 0 to 1.
        perhaps: other possible bottlenecks, if other processes disturbed the measurement of the peaks.
    """

    phase: Phase
    bottleneck: Bottleneck
    evidence: str
    ceiling: float
    roofline_share: float
    perhaps: tuple[Bottleneck, ...] = ()


def diagnose(phase_profile: PhaseProfile, hardware: Hardware, memory: MemoryUse | None = None) -> Diagnosis:
    """Diagnose what limits a phase.

    Args:
        phase_profile: the phase as measured.
        hardware: measured peaks.
        memory: peak memory, to check whether it fits; without it, the moved bytes are used.
    """
    share = min(1.0, roofline_s(phase_profile, hardware) / phase_profile.seconds)
    bottleneck = find_bottleneck(phase_profile, hardware, memory)
    possible = (hardware.at_best(flops=False), hardware.at_best(bandwidth=False))
    others = {find_bottleneck(phase_profile, machine, memory) for machine in possible} - {bottleneck}
    return Diagnosis(
        phase=phase_profile.phase,
        bottleneck=bottleneck,
        evidence=_evidence(phase_profile, hardware, bottleneck, share, memory)
        + _counters(phase_profile)
        + (f" (others disturbed the measured peaks: perhaps {' or '.join(sorted(others))}-bound)" if others else ""),
        ceiling=1 / share if share else float("inf"),
        roofline_share=share,
        perhaps=tuple(sorted(others)),
    )


def supported(diagnosis: Diagnosis, told: str) -> Diagnosis:
    """Return the same verdict with more evidence, which another tool counted."""
    return replace(diagnosis, evidence=f"{diagnosis.evidence} ({told})")


def find_bottleneck(phase: PhaseProfile, hardware: Hardware, memory: MemoryUse | None = None) -> Bottleneck:
    """Return only the bottleneck; see the module's docstring for the definitions."""
    if needed_bytes(phase, memory) > FULL * hardware.memory_bytes:
        return "capacity"
    overhead = overhead_s(phase) / phase.seconds
    waiting = phase.sync_s / phase.seconds
    if (waiting >= LARGE_SYNC and phase.idle >= LARGE_SYNC) or copying(phase) >= LARGE_SYNC:
        return "sync"
    if overhead >= DOMINANT:
        return "overhead"
    return work_bound(phase, hardware) if 1 - overhead >= DOMINANT else "mixed"


def work_bound(phase: PhaseProfile, hardware: Hardware) -> Literal["compute", "memory", "kv-cache"]:
    """Return what limits the working time of a phase, without regard to its overhead."""
    if phase.growth_s > GROWING * phase.seconds:
        return "kv-cache"
    machine = ridge(hardware.peak_flops_per_s(phase.compute_dtype), hardware.bandwidth_bytes_per_s)
    if phase.moved_bytes == 0 or classify(intensity(phase.flops, phase.moved_bytes), machine) == "compute":
        return "compute"
    return "kv-cache" if phase.cache_bytes > phase.weight_bytes else "memory"


def overhead_s(phase: PhaseProfile) -> float:
    """Return the seconds between operators and in small operators."""
    return max(0.0, phase.seconds * (1 - phase.busy)) + phase.small_s


def copying(phase: PhaseProfile) -> float:
    """Return the share of the time in which data moves between host and device and nothing is computed."""
    return phase.device.copy_s / phase.seconds if phase.device is not None else 0.0


def needed_bytes(phase: PhaseProfile, memory: MemoryUse | None) -> float:
    """Return the bytes that must be in memory for the phase to run: what its module, cache and activations take.

    Weights that only the original or the other phase reads do not count: this phase runs as fast without them.
    """
    if memory is None:
        return phase.moved_bytes
    return phase.stored_bytes + memory.cache_bytes + memory.activations_bytes


def _counters(phase: PhaseProfile) -> str:
    """Describe the device's counters; empty if there are none."""
    counters = phase.device.counters if phase.device is not None else None
    told = counters.evidence() if counters is not None else ""
    return f" ({told})" if told else ""


def _evidence(
    phase: PhaseProfile, hardware: Hardware, bottleneck: Bottleneck, share: float, memory: MemoryUse | None
) -> str:
    unit, subject = UNITS[phase.phase], f"{phase.phase}"
    best = f"at 100 % it would be {1 / share:.1f}x faster" if share else "its floor is unknown"
    floor = f"the roofline floor is {_ms(roofline_s(phase, hardware))}; {best}"
    spent = overhead_s(phase)
    part = f"{_ms(spent)} of {_ms(phase.seconds)} {unit} ({spent / phase.seconds:.0%})".replace("%", " %")
    if bottleneck == "capacity":
        return (
            f"{subject} needs {_gb(needed_bytes(phase, memory))}, more than {FULL:.0%} of the ".replace("%", " %")
            + f"{_gb(hardware.memory_bytes)} there are: capacity-bound"
        )
    if bottleneck == "sync":
        waited = f"{subject} waits for the device {_ms(phase.sync_s)} of {_ms(phase.seconds)} {unit}"
        if phase.device is not None and copying(phase) >= LARGE_SYNC:
            copies = f"for {_ms(phase.device.copy_s)} nothing but copies to or from the host runs"
            return f"{waited}, and {copies}: synchronisation-bound; {floor}"
        working = f"while that works only {_percent(phase.busy)} of the time"
        return f"{waited} {working}: synchronisation-bound; {floor}"
    if bottleneck == "overhead" and phase.device is not None:
        return f"{_launches(phase, phase.device)}: overhead-bound; {floor}"
    if bottleneck == "overhead":
        return (
            f"{subject} spends {part} between its {phase.operator_count} operators and in small ones: "
            f"overhead-bound; {floor}"
        )
    reached = _reached(phase, hardware, work_bound(phase, hardware))
    if bottleneck == "mixed" and phase.device is not None:
        return f"{reached}, and {_launches(phase, phase.device)}: mixed; {best}"
    if bottleneck == "mixed":
        return f"{reached}, and {part} is overhead: mixed; {best}"
    name = {"kv-cache": "KV-cache-bound", "compute": "compute-bound", "memory": "memory-bound"}[bottleneck]
    return f"{reached}: {name}; {best}"


def _launches(phase: PhaseProfile, device: DeviceUse) -> str:
    """Describe how often the host launches work, and how long the device waits for it."""
    kernels = f"{device.launches} kernels"
    if device.graph_launches == device.launches == 1:
        kernels = f"{device.kernel_count} kernels as 1 graph"
    elif device.graph_launches:
        kernels = f"{device.kernel_count} kernels, in {device.launches} launches with graphs among them,"
    small = f", and {_ms(phase.small_s)} pass in small kernels" if phase.small_s > phase.seconds / 20 else ""
    return (
        f"{phase.phase} launches {kernels} {UNITS[phase.phase]}; the device idles {_percent(phase.idle)} of "
        f"{_ms(phase.seconds)}, in {_percent(device.late)} of the gaps it waits for the host{small}"
    )


def _reached(phase: PhaseProfile, hardware: Hardware, bound: str) -> str:
    """Describe what the phase moves or computes per second, and which share of the measured peak that is."""
    unit = UNITS[phase.phase]
    if bound == "compute":
        peak, rate = hardware.peak_flops_per_s(phase.compute_dtype), phase.flops / phase.seconds
        known = phase.compute_dtype in hardware.flops_per_s
        best = f"the {_flops(peak)} measured" if known else f"at most {_flops(peak)}"
        return (
            f"{phase.phase} computes {_flops(phase.flops, '')} {unit} at {_flops(rate)}, "
            f"{_percent(rate / peak)} of {best} for {phase.compute_dtype}"
        )
    peak, rate = hardware.bandwidth_bytes_per_s, phase.moved_bytes / phase.seconds
    cache = f", {_percent(phase.cache_bytes / phase.moved_bytes)} of it KV cache," if bound == "kv-cache" else ""
    if bound == "kv-cache" and phase.growth_s > GROWING * phase.seconds:
        cache += f" {_ms(phase.growth_s)} of {_ms(phase.seconds)} growing with the context,"
    return (
        f"{phase.phase} moves {_mb(phase.moved_bytes)} {unit}{cache} at {_gb(rate)}/s, "
        f"{_percent(rate / peak)} of the {_gb(peak)}/s measured"
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _mb(size: float) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e9 else _gb(size)


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e12:.3g} TB"


def _flops(amount: float, per: str = "/s") -> str:
    return f"{amount / 1e9:.3g} GFLOP{per}" if amount < 1e12 else f"{amount / 1e12:.3g} TFLOP{per}"
