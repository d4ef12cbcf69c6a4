"""The processor and its memory, as the system reports them."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch

CONTROL_GROUPS = Path("/sys/fs/cgroup")


class _Group(NamedTuple):
    """Files in which a container's control group keeps its limit, what it uses, and which of it are files to drop."""

    limit: str
    used: str
    statistics: str
    droppable: str


GROUPS = (  # of version 2 and of version 1
    _Group("memory.max", "memory.current", "memory.stat", "inactive_file"),
    _Group("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def instruction_set() -> str:
    """The vector instructions torch uses here; "NEON" on every 64-bit ARM, where torch says "DEFAULT"."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() in ("aarch64", "arm64") and capability == "DEFAULT":
        return "NEON"
    return capability


def name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, platform.processor() or platform.machine())


def instruction_sets() -> str:
    """The CPU's model and instruction sets, as far as the system reports them. Code compiled here depends on them."""
    told = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told += sorted({line for line in lines if line.startswith(("model name", "flags", "CPU part", "Features"))})
    return "\n".join(told)


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or its container's limit where that is smaller."""
    limits = (_bytes_in(group.limit) for group in GROUPS)
    return min([_machine_bytes(), *(limit for limit in limits if limit is not None)])


def memory_left() -> int | None:
    """Bytes that all processes of this container may still take; None where no container limits them.

    Files in memory that the kernel would drop are counted as free, as it does in MemAvailable.
    """
    for group in GROUPS:
        limit, used = _bytes_in(group.limit), _bytes_in(group.used)
        if limit is not None and used is not None and limit < _machine_bytes():
            return max(0, limit - used + _statistic(group))
    return None


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes_in(name: str) -> int | None:
    """The number in a control group's file; None if there is none, or it says "max"."""
    try:
        text = (CONTROL_GROUPS / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(group: _Group) -> int:
    try:
        lines = (CONTROL_GROUPS / group.statistics).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{group.droppable} ")), 0)
