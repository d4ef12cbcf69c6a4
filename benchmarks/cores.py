"""How many threads a runtime should compute with."""

from __future__ import annotations

import os
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores(topology: Path = TOPOLOGY, quota: Path = QUOTA) -> int:
    """Physical cores that this process may use: hyper-threads share one, and a container may be allowed fewer."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_core(topology / f"cpu{cpu}" / "topology", cpu) for cpu in allowed}
    try:
        limit, period = quota.read_text().split()
        return max(1, min(len(cores), int(limit) // int(period)))
    except (OSError, ValueError):  # no control groups, or "max": no limit
        return len(cores)


def _core(folder: Path, cpu: int) -> tuple[str, ...]:
    try:
        return tuple((folder / name).read_text().strip() for name in ("physical_package_id", "core_id"))
    except OSError:
        return (str(cpu),)
