"""Trace a piece of work with torch's profiler, and read the file that it writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import MeasurementError


def record(work: Callable[[], object], where: torch.device, wait: Callable[[], object], **options: Any) -> bytes:
    """Run `work` and return its Chrome trace, JSON: the host's part and, on a GPU, the device's.

    Args:
        wait: waits until all queued work has run.
        options: further options of `torch.profiler.profile`.

    Raises:
        MeasurementError: the trace could not be written.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if where.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        silent_kineto(),
        profile(activities=activities, record_shapes=True, acc_events=True, **options) as recorded,
    ):
        work()
        wait()  # work that is still queued belongs to the trace
    try:
        with tempfile.TemporaryDirectory(prefix="autotune-") as folder:
            file = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(file))
            return file.read_bytes()
    except (OSError, RuntimeError) as error:
        raise MeasurementError(
            f"the profiler's trace could not be written ({error}): make room for it, or set TMPDIR to another directory"
        ) from error


def initialise() -> None:
    """Have the calling thread initialise the profiling library, which takes about a millisecond.

    The thread that loaded torch must do this. If another thread does it first, the library writes an error to stderr.
    """
    from torch.autograd.profiler import profile

    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        with silent_kineto(), profile(use_kineto=False):
            pass


@contextmanager
def silent_kineto() -> Iterator[None]:
    """Keep the profiling library from writing its start and stop to stderr. It reads the environment on first use."""
    variable = "KINETO_LOG_LEVEL"
    if variable in os.environ:  # the user has chosen a level
        yield
        return
    os.environ[variable] = "99"
    try:
        yield
    finally:
        del os.environ[variable]
