"""Where the time of a phase goes: a trace, scaled to the phase's unprofiled time and joined with the work counted."""

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

SMALL_KERNEL_S = 5e-6  # a GPU takes 5 to 20 us to launch a kernel: one shorter than that waits for the next
SMALL_S = 20e-6  # at 25 GB/s an operator this short moves 500 KB at most: its start, not its work, is what it costs

KERNELS = 20  # rows of the kernel table that are kept: the rest is short


@dataclass(frozen=True)
class Share:
    """What a trace says about a phase, scaled to its unprofiled time; all but the counts in seconds."""

    groups: Mapping[str, float]
    small: Mapping[str, float]
    busy_s: float
    linear_s: float
    attention_s: float
    small_s: float
    around_attention_s: float
    operator_count: int
    sync_s: float


def share(trace: Trace, seconds: float) -> Share:
    """Attribute `seconds`, the phase's unprofiled time, to groups; what is left is the framework's.

    Operators are taken as traced, unless the host ran at another speed meanwhile: a profiled step can only be slower
    than an unprofiled one, and its operators alone cannot take longer. Then the trace counts for its proportions.
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
    return Share(
        groups=groups,
        small=small,
        busy_s=busy * scale,
        linear_s=linear or groups.get(COMPILED, 0.0),  # matmuls that a compiler fused away are all of its step
        attention_s=attention,
        small_s=sum(small.values()),
        around_attention_s=around * scale,
        operator_count=sum(span.outermost for span in trace.spans),
        sync_s=min(trace.sync_s, seconds),
    )


def device_use(trace: Trace, seconds: float, event_s: float, counters: Counters | None) -> DeviceUse | None:
    """What a GPU did in `seconds` of unprofiled time; None where there is none.

    Args:
        event_s: the same time by the device's own events.
        counters: what NVML told meanwhile.
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
    """What a traced second of an operator counts for."""
    summed = sum(span.seconds for span in trace.spans if span.works)
    if trace.timeline is None:
        return seconds / trace.seconds if trace.seconds < seconds or summed > seconds else 1.0
    # a device works as long whatever the host does; what overlaps on two streams takes its time once
    busy = min(trace.timeline.busy_s, seconds)
    return min(1.0, busy / summed) if summed else 1.0


def table(share: Share, work: Mapping[str, Work], ridge: float) -> tuple[Operator, ...]:
    """The operator table: time as attributed, FLOPs and bytes as counted, one row a group.

    Args:
        share: where the time went.
        work: FLOPs and bytes by group.
        ridge: FLOPs per byte above which this machine computes longer than it moves.
    """
    rows, work = [], dict(work)
    if COMPILED in share.groups:  # the work of parts that were fused beyond recognition is done there
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
        return "-"  # fused: what of it moves or computes is not known
    return classify(intensity(flops, moved), ridge) if moved else "memory"  # element-wise work moves activations
