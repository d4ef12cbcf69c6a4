"""The processor and its memory, as the system reports them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


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
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = Path(limit)
        if file.exists() and (text := file.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total
