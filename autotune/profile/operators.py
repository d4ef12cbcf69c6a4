"""The operator table of a phase: a trace, scaled to the phase's unprofiled time and joined with the counted work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..diagnose.costs import DeviceUse, Operator
from ..diagnose.parts import ATTENTION, CACHE, COMPILED, GROUPS, OVERHEAD
from ..diagnose.work import Work
from ..machine.roofline import classify, intensity
from .spans import Trace

if TYPE_CHECKING:
    from ..machine.device.counters import Counters

# Seconds below which a kernel or an operator counts as small, because its start costs more than its work.
SMALL_KERNEL_S = 5e-6  # on a GPU, which takes 5 to 20 us to launch the next kernel
SMALL_S = 20e-6  # on a CPU: at 25 GB/s, an operator this short moves at most 500 KB

KERNELS = 20  # rows kept of the kernel table; the others take little time


@dataclass(frozen=True)
class PhaseTimes:
    """Times of a phase from a trace, scaled to its unprofiled time. Everything except the counts is in seconds."""

    groups: Mapping[str, float]
    small: Mapping[str, float]
    busy_s: float
    linear_s: float
    attention_s: float
    small_s: float
    around_attention_s: float
    operator_count: int
    sync_s: float
    loop_s: float
    matmul_count: int


def share(trace: Trace, seconds: float) -> PhaseTimes:
    """Attribute `seconds`, the phase's unprofiled time, to groups. The rest is the framework's overhead.

    Operators' times are used as traced, unless the host ran at another speed during the trace. That is the case if the
    profiled step was faster than the unprofiled one, or if its operators alone took longer. Then only the trace's
    proportions are used.
    """
    working = [span for span in trace.spans if span.works]
    scale, small_s = _scale(trace, seconds), SMALL_S if trace.timeline is None else SMALL_KERNEL_S
    busy = sum(span.seconds for span in working)
    groups, small = dict[str, float](), dict[str, float]()
    for span in working:
        groups[span.group] = groups.get(span.group, 0.0) + span.seconds * scale
        if span.role is None and span.seconds < small_s:
            small[span.group] = small.get(span.group, 0.0) + span.seconds * scale
    groups[OVERHEAD] = max(0.0, seconds - busy * scale)
    linear, attention = (sum(s.seconds * scale for s in working if s.role == role) for role in ("linear", "attention"))
    surroundings = {ATTENTION, CACHE, COMPILED} if linear else {ATTENTION, CACHE}
    around = sum(s.seconds for s in working if s.group in surroundings and s.role not in ("linear", "attention"))
    return PhaseTimes(
        groups=groups,
        small=small,
        busy_s=busy * scale,
        linear_s=linear or groups.get(COMPILED, 0.0),  # if a compiler fused all matmuls, its whole step counts
        attention_s=attention,
        small_s=sum(small.values()),
        around_attention_s=around * scale,
        operator_count=sum(span.outermost for span in trace.spans),
        sync_s=min(trace.sync_s, seconds),
        loop_s=trace.loop_s * scale if trace.timeline is None else trace.loop_s,
        matmul_count=sum(span.outermost and span.role in ("linear", "attention") for span in trace.spans),
    )


def device_use(trace: Trace, seconds: float, event_s: float, counters: Counters | None) -> DeviceUse | None:
    """Return what a GPU did in `seconds` of unprofiled time; None on a CPU.

    Args:
        event_s: the same time, measured by the device's events.
        counters: NVML's readings during that time.
    """
    found = trace.timeline
    if found is None:
        return None
    busy_s = min(found.busy_s, seconds)
    traced_idle_s = found.seconds - found.busy_s
    scale = (seconds - busy_s) / traced_idle_s if traced_idle_s > 0 else 0.0
    return DeviceUse(
        busy_s=busy_s,
        launches=found.launches,
        kernel_count=found.kernel_count,
        gap_s=found.gap_s * scale,
        host_wait_s=found.host_wait_s * scale,
        late=found.host_waits / found.gaps if found.gaps else 0.0,
        copy_s=min(found.copy_s, seconds),
        graph_launches=found.graph_launches,
        launch_s=found.launch_s,
        event_s=event_s,
        copies=found.copies,
        kernels=found.kernels[:KERNELS],
        counters=counters,
    )


def _scale(trace: Trace, seconds: float) -> float:
    """Return the factor from an operator's traced time to its unprofiled time."""
    summed = sum(span.seconds for span in trace.spans if span.works)
    if trace.timeline is None:
        return seconds / trace.seconds if trace.seconds < seconds or summed > seconds else 1.0
    # the device's time does not depend on the host; work that overlaps on two streams counts once
    busy = min(trace.timeline.busy_s, seconds)
    return min(1.0, busy / summed) if summed else 1.0


def table(share: PhaseTimes, work: Mapping[str, Work], ridge: float) -> tuple[Operator, ...]:
    """Return the operator table with one row per group: attributed time, counted FLOPs and bytes.

    Args:
        share: times of the phase by group.
        work: FLOPs and bytes by group.
        ridge: FLOPs per byte above which this machine needs more time to compute than to move data.
    """
    rows, work = [], dict(work)
    if COMPILED in share.groups:  # groups without time were fused into the compiled step
        fused = [work.pop(group) for group in tuple(work) if group not in share.groups]
        work[COMPILED] = sum(fused, Work())
    for group in GROUPS:
        seconds, part = share.groups.get(group, 0.0), work.get(group, Work())
        moved = part.weight_bytes + part.cache_bytes
        if seconds or part.flops or moved:
            limit = _limit(group, seconds, share.small.get(group, 0.0), part.flops, moved, ridge)
            rows.append(Operator(group, seconds, part.flops, moved, limit))
    return tuple(rows)


def _limit(group: str, seconds: float, small_s: float, flops: float, moved: float, ridge: float) -> str:
    if not seconds:
        return "-"
    if group == OVERHEAD or small_s > seconds / 2:
        return "overhead"
    if group == COMPILED and not flops:
        return "-"  # the fused work's FLOPs are unknown
    return classify(intensity(flops, moved), ridge) if moved else "memory"  # element-wise work moves activations
