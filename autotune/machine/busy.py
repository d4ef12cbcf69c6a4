"""How much of the machine's CPU time others took: other processes, the hypervisor, a container's other tenants.

    read -> Reading      what the kernel has counted so far
    elsewhere            two readings to the share that others took in between; pure

What a process can use is the time of the CPUs that it may run on, or a quota where that is less. What others took of it
is what all processes and the hypervisor took, less what this process and its children did. Time that this process left
unused and nobody took is nobody's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Share of the CPU time that is worth a word. The daemons of a quiet machine take 1 to 3 %, and over the two seconds of
# the shortest measurement one tick of 10 ms is 0.5 % of a CPU. It is the share from which a timed pair is dropped, too.
NOTICEABLE = 0.05
PLAUSIBLE = 0.5  # of our own CPU time that the machine's counters must show at least; some sandboxes show zeros


@dataclass(frozen=True)
class Reading:
    """What the kernel has counted until now. None: it does not say.

    Args:
        clock_s: monotonic seconds.
        cpus: how many this process may run on.
        quota: CPUs whose time the control group may use; infinite without a limit.
        used_s: CPU seconds that all processes took of these CPUs, and the hypervisor of them.
        own_s: CPU seconds of this process and those that it started.
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


def elsewhere(before: Reading, after: Reading) -> float | None:
    """Share of the CPU time that this process could have used and others took, 0 to 1; None where nothing says. Pure.

    Others may use what a quota keeps from this process. And nobody took from it more than it left unused: a process
    that is throttled because it used up the quota by itself lost nothing to others.
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
    """Whether others took so much that what was measured meanwhile may be theirs."""
    return share is not None and share >= NOTICEABLE


class Meter:
    """Counts from when it was made."""

    def __init__(self) -> None:
        self._start = read()

    def elsewhere(self) -> float | None:
        """What others took since, as `elsewhere`."""
        return elsewhere(self._start, read())


def read(proc: Path = PROC, cgroups: Path = CGROUPS, clock: Callable[[], float] = time.monotonic) -> Reading:
    """What the kernel says now; on systems without /proc, next to nothing.

    Args:
        proc, cgroups: where its file systems are.
        clock: monotonic seconds.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        groups = _groups(proc, cgroups)
        return Reading(
            clock_s=clock(),
            cpus=len(cpus),
            quota=min(map(_quota, groups), default=math.inf),
            used_s=_used_s(proc / "stat", cpus),
            own_s=_own_s(proc),
            throttled_s=max((t for group in groups if (t := _throttled_s(group)) is not None), default=None),
            stalled_s=next((stalled for group in groups if (stalled := _stalled_s(group)) is not None), None),
        )
    except (ValueError, IndexError):  # a kernel that says it in another form
        return Reading(clock(), len(cpus))


def _passed(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else max(0.0, after - before)


def _used_s(stat: Path, cpus: set[int]) -> float | None:
    """user + nice + system + steal of the CPUs; a line is "cpu0 user nice system idle iowait irq softirq steal"."""
    ticks, names = 0, {f"cpu{cpu}" for cpu in cpus}
    for line in _lines(stat):
        name, *counts = line.split()
        if name in names and len(counts) > 7:
            names.remove(name)
            ticks += sum(int(counts[i]) for i in (0, 1, 2, 7))
    return None if names else ticks / _ticks_per_s()


def _own_s(proc: Path) -> float | None:
    """CPU seconds of this process and of all that it started, whether they run or have ended."""
    total, pending = _spent_s(proc / "self"), [proc / "self"]
    while pending and total is not None:
        tasks = pending.pop() / "task"
        for child in [word for task in _entries(tasks) for line in _lines(task / "children") for word in line.split()]:
            total += _spent_s(proc / child) or 0.0
            pending.append(proc / child)
    return total


def _spent_s(process: Path) -> float | None:
    """utime + stime + cutime + cstime of a process: its own, and that of its children that it has waited for."""
    for line in _lines(process / "stat"):
        return sum(map(int, line.rpartition(")")[2].split()[11:15])) / _ticks_per_s()
    return None


def _groups(proc: Path, cgroups: Path) -> list[Path]:
    """This process's control group for CPU time and those around it, the innermost first; version 2, then version 1."""
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
    """From the line "full avg10=0.00 avg60=0.00 avg300=0.00 total=0", microseconds."""
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
