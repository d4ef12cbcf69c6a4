"""How much of the machine's CPU time others took: other processes, the hypervisor, a container's other tenants.

    read -> Reading      the kernel's counters at this moment
    elsewhere            the share that others took between two readings; pure

A process can use the time of the CPUs that it may run on, or its quota if that is less. Others took the time that all
processes and the hypervisor took, minus the time of this process and its children. Idle time counts for nobody.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Share of the CPU time from which others' use is reported and a timed pair is dropped. The daemons of a quiet machine
# take 1 to 3 %. Over the two seconds of the shortest measurement, one tick of 10 ms is 0.5 % of a CPU.
NOTICEABLE = 0.05
PLAUSIBLE = 0.5  # least share of our own CPU time that the machine's counters must show; some sandboxes show zeros


@dataclass(frozen=True)
class CpuCounters:
    """The kernel's counters at one moment. None: the kernel does not report the value.

    Args:
        clock_s: monotonic seconds.
        cpus: number of CPUs that this process may run on.
        quota: CPUs whose time the control group may use; infinite without a limit.
        used_s: CPU seconds of these CPUs that all processes and the hypervisor took.
        own_s: CPU seconds of this process and the processes that it started.
        throttled_s: CPU seconds for which the quota held the control group back.
        stalled_s: seconds for which everything in the control group waited for a CPU.
    """

    clock_s: float
    cpus: int
    quota: float = math.inf
    used_s: float | None = None
    own_s: float | None = None
    throttled_s: float | None = None
    stalled_s: float | None = None


def elsewhere(before: CpuCounters, after: CpuCounters) -> float | None:
    """Share, 0 to 1, of the CPU time usable by this process that others took; None if it is unknown. Pure.

    Time beyond this process's quota is free for others and does not count. Others took at most what this process left
    unused: a process that is throttled because it used up its own quota lost nothing to others.
    """
    wall_s = after.clock_s - before.clock_s
    usable = min(after.quota, after.cpus)
    own_s, used_s = _passed(before.own_s, after.own_s), _passed(before.used_s, after.used_s)
    if wall_s <= 0 or usable <= 0 or own_s is None:
        return None
    lost_s = [_passed(before.throttled_s, after.throttled_s), _passed(before.stalled_s, after.stalled_s)]
    if used_s is not None and used_s >= PLAUSIBLE * own_s:
        lost_s.append(used_s - own_s - (after.cpus - usable) * wall_s)
    known = [lost for lost in lost_s if lost is not None]
    if not known:
        return None
    left_s = usable * wall_s - own_s
    return max(0.0, min(max(known), left_s) / (usable * wall_s))


def is_noticeable(share: float | None) -> bool:
    """Whether others took enough to affect what was measured meanwhile."""
    return share is not None and share >= NOTICEABLE


class Meter:
    """Measures what others take from its creation on."""

    def __init__(self) -> None:
        self._start = read()

    def elsewhere(self) -> float | None:
        """Share that others took since then, as in the function `elsewhere`."""
        return elsewhere(self._start, read())


def read(proc: Path = PROC, cgroups: Path = CGROUPS, clock: Callable[[], float] = time.monotonic) -> CpuCounters:
    """Read the kernel's counters. On systems without /proc, nearly all of them are None.

    Args:
        proc, cgroups: mount points of the kernel's file systems.
        clock: monotonic seconds.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        groups = _groups(proc, cgroups)
        return CpuCounters(
            clock_s=clock(),
            cpus=len(cpus),
            quota=min(map(_quota, groups), default=math.inf),
            used_s=_used_s(proc / "stat", cpus),
            own_s=_own_s(proc),
            throttled_s=max((t for group in groups if (t := _throttled_s(group)) is not None), default=None),
            stalled_s=next((stalled for group in groups if (stalled := _stalled_s(group)) is not None), None),
        )
    except (ValueError, IndexError):  # a kernel with another format
        return CpuCounters(clock(), len(cpus))


def _passed(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else max(0.0, after - before)


def _used_s(stat: Path, cpus: set[int]) -> float | None:
    """CPU seconds: user + nice + system + steal. A line is "cpu0 user nice system idle iowait irq softirq steal"."""
    ticks, names = 0, {f"cpu{cpu}" for cpu in cpus}
    for line in _lines(stat):
        name, *counts = line.split()
        if name in names and len(counts) > 7:
            names.remove(name)
            ticks += sum(int(counts[i]) for i in (0, 1, 2, 7))
    return None if names else ticks / _ticks_per_s()


def _own_s(proc: Path) -> float | None:
    """CPU seconds of this process and of all processes that it started, running or ended."""
    total, pending = _spent_s(proc / "self"), [proc / "self"]
    while pending and total is not None:
        tasks = pending.pop() / "task"
        for child in [word for task in _entries(tasks) for line in _lines(task / "children") for word in line.split()]:
            total += _spent_s(proc / child) or 0.0
            pending.append(proc / child)
    return total


def _spent_s(process: Path) -> float | None:
    """CPU seconds of a process and of the children that it waited for: utime + stime + cutime + cstime."""
    for line in _lines(process / "stat"):
        return sum(map(int, line.rpartition(")")[2].split()[11:15])) / _ticks_per_s()
    return None


def _groups(proc: Path, cgroups: Path) -> list[Path]:
    """This process's control group for CPU time and its parents, innermost first; version 2, then version 1."""
    own = dict[str, str]()
    for line in _lines(proc / "self" / "cgroup"):  # "0::/a/b", or in version 1 "1:cpu,cpuacct:/a/b"
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path.strip("/"))
    found = []
    for top, controller in ((cgroups, ""), (cgroups / "cpu", "cpu")):
        inner = top / own.get(controller, "")
        around = [inner, *inner.parents]
        found += [folder for folder in around[: around.index(top) + 1] if (folder / "cpu.stat").exists()]
    return found


def _quota(group: Path) -> float:
    """CPUs whose time a control group may use; infinite where it has no limit."""
    words = " ".join([*_lines(group / "cpu.max"), *_lines(group / "cpu.cfs_quota_us")]).split()
    period = [*words[1:], *_lines(group / "cpu.cfs_period_us")]
    if not period or not words[0].isdigit():  # "max", or -1
        return math.inf
    return int(words[0]) / int(period[0])


def _throttled_s(group: Path) -> float | None:
    units = {"throttled_usec": 1e6, "throttled_time": 1e9}  # version 2, version 1
    for line in _lines(group / "cpu.stat"):
        name, count = line.split()
        if name in units:
            return int(count) / units[name]
    return None


def _stalled_s(group: Path) -> float | None:
    """Stalled seconds, from the line "full avg10=0.00 avg60=0.00 avg300=0.00 total=0" in microseconds."""
    for line in _lines(group / "cpu.pressure"):
        if line.startswith("full "):
            return int(line.rpartition("total=")[2]) / 1e6
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _ticks_per_s() -> int:
    return os.sysconf("SC_CLK_TCK")
