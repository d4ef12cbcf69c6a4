"""The CPU: work is complete when its call returns."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...errors import DeviceError
from .. import processor
from .base import Device, Graph, Identity, Memory
from .owner import GraphThread

SCRATCH_BYTES = 512 * 2**20  # larger than the caches of most machines


class Cpu(Device):
    kind, asynchronous = "cpu", False

    def identity(self) -> Identity:
        return Identity(processor.name(), processor.instruction_set(), processor.memory_bytes())

    def synchronize(self) -> None: ...

    def seconds(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def scratch_bytes(self) -> int:
        return min(SCRATCH_BYTES, self.identity().memory_bytes // 16)

    def memory(self) -> Memory:
        total = processor.memory_bytes()
        available, used = _meminfo("/proc/meminfo", "MemAvailable"), _meminfo("/proc/self/status", "VmRSS")
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        left = processor.memory_left()
        free = min(total // 2 if available is None else available, total if left is None else left)
        return Memory(free, peak if used is None else used, max(peak, used or 0))

    def reset_peak(self) -> None: ...

    def release(self) -> None:
        trim_host()

    def mark(self) -> None: ...

    def wait(self, mark: Any) -> None: ...

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return tensor.cpu

    def capture(self, work: Callable[[], torch.Tensor], pool: Any = None) -> tuple[Graph, torch.Tensor]:
        raise DeviceError(self.without_graphs())

    def record_graph(self, work: Callable[[], torch.Tensor], pool: Any) -> tuple[Graph, torch.Tensor]:
        raise DeviceError(self.without_graphs())

    def drop_workspaces(self) -> None: ...

    def pool(self) -> None: ...

    @property
    def owner(self) -> GraphThread:
        raise DeviceError(self.without_graphs())


def trim_host() -> None:
    """Give memory back to the system: layers may hold reference cycles, and glibc keeps freed blocks up to 32 MiB."""
    gc.collect()
    give_back()


def give_back() -> None:
    """Give freed blocks back to the system, in milliseconds."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _meminfo(file: str, key: str) -> int | None:
    """One of the Linux kernel's memory figures in bytes; None on other systems."""
    try:
        with open(file) as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
    except (OSError, StopIteration):
        return None
