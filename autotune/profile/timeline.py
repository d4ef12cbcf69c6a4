"""When the device worked during a phase, when it idled, and whether the host caused the idle time.

There is a gap between two stretches of work. If the next kernel was launched before the last one ended, the device
caused the gap (a launch takes a few microseconds to arrive). If it was launched afterwards, the device had nothing to
do and waited for the host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..diagnose.costs import Copy, Kernel
from ..diagnose.parts import RANGE
from .recording import RUNTIME, DeviceEvent, HostCall, Recording

Interval = tuple[float, float]  # seconds since the recording began

GRAPH_LAUNCHES = frozenset({"cudaGraphLaunch", "cuGraphLaunch"})
WAITS = frozenset(
    f"{library}{what}Synchronize"
    for library, what in (
        ("cuda", "Device"),
        ("cuda", "Stream"),
        ("cuda", "Event"),
        ("cu", "Ctx"),
        ("cu", "Stream"),
        ("cu", "Event"),
    )
)
TO_AND_FROM_HOST = frozenset({"HtoD", "DtoH"})
_DIRECTION = re.compile(r"\b([HDP]to[HDP])\b")


@dataclass(frozen=True)
class Timeline:
    """What the device did in one call or token.

    Args:
        seconds: length of the call or token, under the profiler.
        busy_s: seconds in which at least one stream worked.
        launches: launches by the host of the kernels that started; a graph counts once.
        graph_launches: number of these launches that started a graph.
        kernel_count: kernels that started.
        gap_s: seconds in gaps between stretches of work.
        gaps: number of gaps.
        host_wait_s: part of `gap_s` in gaps whose next kernel was launched only after the device had become idle.
        host_waits: number of such gaps.
        launch_s: median time from such a late launch to its kernel's start; 0 if there was none.
        copies: copies by direction.
        copy_s: seconds in which copies to or from the host ran and no kernel did.
        sync_s: seconds that the host spent waiting for the device, in calls that wait and in copies to pageable memory.
        kernels: the kernel table, the longest first.
    """

    seconds: float
    busy_s: float = 0.0
    launches: int = 0
    graph_launches: int = 0
    kernel_count: int = 0
    gap_s: float = 0.0
    gaps: int = 0
    host_wait_s: float = 0.0
    host_waits: int = 0
    launch_s: float = 0.0
    copies: tuple[Copy, ...] = ()
    copy_s: float = 0.0
    sync_s: float = 0.0
    kernels: tuple[Kernel, ...] = ()

    @property
    def idle(self) -> float:
        """Share of the time in which the device did nothing, 0 to 1."""
        return max(0.0, 1 - self.busy_s / self.seconds) if self.seconds else 0.0


@dataclass(frozen=True)
class Gap:
    """A time from `start_s` to `end_s` in which nothing runs; it ends when `next_` starts."""

    start_s: float
    end_s: float
    next_: DeviceEvent

    @property
    def waits_for_host(self) -> bool:
        """Whether the next work was launched only after the device had become idle."""
        return self.next_.launch is not None and self.next_.launch.start_s >= self.start_s


def timeline(recording: Recording, window: Interval | None = None) -> Timeline:
    """Summarise the device's time between two moments of a recording.

    Args:
        recording: the whole recording; work across the window's edges counts with its part inside.
        window: start and end in seconds, by default from the first event to the last.
    """
    start, end = window or _extent(recording)
    inside = [work for work in recording.work if work.end_s > start and work.start_s < end]
    kernels = [work for work in inside if work.category == "kernel"]
    copies = [work for work in inside if work.category == "gpu_memcpy"]
    gaps = [gap for gap in find_gaps(recording.work) if gap.end_s > start and gap.start_s < end]
    late = [gap for gap in gaps if gap.waits_for_host]
    started = [work for work in kernels if work.start_s >= start]
    firsts = dict[int, DeviceEvent]()  # first kernel of each launch: a graph's kernels share one launch
    for work in recording.work:
        if work.category == "kernel":
            firsts.setdefault(work.correlation or id(work), work)
    launches = [work for work in firsts.values() if start <= work.start_s < end]
    host = [work for work in copies if direction(work.name) in TO_AND_FROM_HOST]
    rest = [work for work in inside if work not in host]
    busy_s = covered(inside, start, end)
    return Timeline(
        seconds=end - start,
        busy_s=busy_s,
        launches=len(launches),
        graph_launches=sum(work.launch is not None and work.launch.name in GRAPH_LAUNCHES for work in launches),
        kernel_count=len(started),
        gap_s=sum(within(gap, start, end) for gap in gaps),
        gaps=len(gaps),
        host_wait_s=sum(within(gap, start, end) for gap in late),
        host_waits=len(late),
        launch_s=median([g.end_s - g.next_.launch.start_s for g in late if g.next_.launch]) if late else 0.0,
        copies=_copies(copies, start, end),
        copy_s=busy_s - covered(rest, start, end),
        sync_s=sum(within(call, start, end) for call in waits(recording)),
        kernels=table(kernels, start, end),
    )


def find_gaps(work: Sequence[DeviceEvent]) -> Iterator[Gap]:
    """Yield the gaps in which no stream is busy. The time before the first work is not a gap."""
    reached: float | None = None
    for each in work:
        if reached is not None and each.start_s > reached:
            yield Gap(reached, each.start_s, each)
        reached = each.end_s if reached is None else max(reached, each.end_s)


def covered(work: Iterable[DeviceEvent], start: float, end: float) -> float:
    """Return the seconds of a window in which at least one of these events ran; overlaps count once."""
    total, reached = 0.0, start
    for each in sorted(work, key=lambda w: w.start_s):
        total += max(0.0, min(each.end_s, end) - max(each.start_s, reached))
        reached = max(reached, min(each.end_s, end))
    return total


def table(kernels: Iterable[DeviceEvent], start: float, end: float) -> tuple[Kernel, ...]:
    """Sum up kernels by name, operator and group, the longest first."""
    rows = dict[tuple[str, str, str], list[DeviceEvent]]()
    for work in kernels:
        operator = work.operator.name if work.operator is not None else ""
        caller = work.launch or work.operator
        rows.setdefault((work.name, operator, (caller and group_of(caller)) or ""), []).append(work)
    found = [
        Kernel(*key, count=len(row), seconds=sum(within(w, start, end) for w in row), occupancy=_occupancy(row))
        for key, row in rows.items()
    ]
    return tuple(sorted(found, key=lambda kernel: -kernel.seconds))


def group_of(call: HostCall) -> str | None:
    """Return the part of the model in whose range a call was made; None if it was in no range."""
    each: HostCall | None = call
    while each is not None:
        if each.name.startswith(RANGE):
            return each.name.removeprefix(RANGE)
        each = each.parent
    return None


def direction(name: str) -> str:
    """Return "HtoD" for "Memcpy HtoD (Pageable -> Device)"; "other" if the name contains no direction."""
    found = _DIRECTION.search(name)
    return found.group(1) if found else "other"


def _copies(copies: Sequence[DeviceEvent], start: float, end: float) -> tuple[Copy, ...]:
    found = dict[str, list[DeviceEvent]]()
    for work in copies:
        found.setdefault(direction(work.name), []).append(work)
    return tuple(
        Copy(name, len(row), sum(within(w, start, end) for w in row), sum(w.size_bytes for w in row))
        for name, row in sorted(found.items())
    )


def _occupancy(row: Sequence[DeviceEvent]) -> float | None:
    known = [(work.occupancy, work.seconds) for work in row if work.occupancy is not None]
    total = sum(seconds for _, seconds in known)
    return sum(occupancy * seconds for occupancy, seconds in known) / total if total else None


def waits(recording: Recording) -> list[HostCall]:
    """Return the outermost calls that wait (a runtime call may contain a driver call), and copies that must wait."""
    found = [c for c in recording.calls if c.category in RUNTIME and c.name in WAITS]
    copies = [w.launch for w in recording.work if w.launch and "DtoH" in w.name and "Pageable" in w.name]
    return [call for call in (*found, *copies) if not (call.parent and call.parent.name in WAITS)]


def within(each: HostCall | DeviceEvent | Gap, start: float, end: float) -> float:
    return max(0.0, min(each.end_s, end) - max(each.start_s, start))


def _extent(recording: Recording) -> Interval:
    events: list[HostCall | DeviceEvent] = [*recording.calls, *recording.work]
    if not events:
        return 0.0, 0.0
    return min(e.start_s for e in events), max(e.end_s for e in events)


def seconds_by_caller(recording: Recording, window: Interval) -> Mapping[HostCall, float]:
    """Return the device time in a window by operator; an operator counts only work that it launched itself."""
    found = dict[HostCall, float]()
    for work in recording.work:
        if work.operator is not None and (seconds := within(work, *window)):
            found[work.operator] = found.get(work.operator, 0.0) + seconds
    return found
