"""What an exception says about the device it came from."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Literal

import torch

Failure = Literal["memory", "dead"]  # recoverable; permanent in this process

OUT_OF_MEMORY = re.compile(
    r"out of memory|can(?:'|no)t allocate memory|not enough memory|bad_alloc|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED|"
    # torch's allocator asks NVML who has the memory, and raises this if NVML refuses, as in MIG slices and containers
    r"NVML_SUCCESS == \w+ INTERNAL ASSERT FAILED",
    re.I,
)
# Errors after which every further call of this process to the device fails: "sticky" in NVIDIA's terms
# (CUDA Runtime API, error handling; cudaErrorAssert, cudaErrorIllegalAddress, cudaErrorLaunchFailure, ...).
DEAD = re.compile(
    r"device-side assert|illegal memory access|illegal instruction|misaligned address|unspecified launch failure|"
    r"invalid program counter|hardware stack error|launch timed out|uncorrectable ECC|fallen off the bus|GPU is lost|"
    r"device is lost|CUDA error: unknown error|driver shutting down",
    re.I,
)


def classify(error: BaseException) -> Failure | None:
    """Return "memory" if something was too large, "dead" if the device cannot be used again, None for other errors.

    The errors that it was raised from count as well; "dead" takes precedence.
    """
    found = {kind for each in _chain(error) if (kind := _kind(each)) is not None}
    return "dead" if "dead" in found else "memory" if found else None


def _kind(error: BaseException) -> Failure | None:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # as mmap raises it
        return "memory"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if DEAD.search(text):
        return "dead"
    return "memory" if OUT_OF_MEMORY.search(text) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen, each = set[int](), error
    while each is not None and id(each) not in seen:
        yield each
        seen.add(id(each))
        each = each.__cause__ or each.__context__  # type: ignore[assignment]
