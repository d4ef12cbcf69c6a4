"""Faults inside a plan that serves: an operator, the slots or the step raise, or a signal arrives meanwhile."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.errors import TransformError
from autotune.runtime.cache import pool
from autotune.runtime.steps import program
from autotune.runtime.variant import Variant


class Late(Exception):
    """What an alarm of the caller's raises."""


ERRORS: dict[str, Callable[[], Exception]] = {
    "out of memory": lambda: torch.OutOfMemoryError("DefaultCPUAllocator: can't allocate memory"),
    "runtime": lambda: RuntimeError("a kernel failed"),
    "refusal": lambda: TransformError("this cannot be had"),
    "memory": lambda: MemoryError("no room"),
    "value": lambda: ValueError("not such a value"),
    "index": lambda: IndexError("index out of range in self"),
}
PLACES = ("operation", "slots", "step", "alarm")


class Failure(NamedTuple):
    """Where and how it fails.

    Args:
        place: one of PLACES.
        at: which operator of the call, counted from 0; the others fail whenever they are asked.
        error: one of ERRORS.
        lasting: whether operators after it fail, too.
    """

    place: str
    at: int = 0
    error: str = "runtime"
    lasting: bool = False


@dataclass
class Injected:
    """Attributes:
    fired: times that it failed.
    entered: times that a plan's module was run.
    """

    fired: int = 0
    entered: int = 0
    operators: int = 0


class _FailAt(TorchDispatchMode):
    def __init__(self, failure: Failure, injected: Injected) -> None:
        super().__init__()
        self.failure = failure
        self.injected = injected

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, failure = self.injected.operators, self.failure
        self.injected.operators += 1
        if number == failure.at or (failure.lasting and number > failure.at):
            self.injected.fired += 1
            if failure.place == "alarm":
                signal.raise_signal(signal.SIGALRM)
            else:
                raise ERRORS[failure.error]()
        return func(*args, **(kwargs or {}))


@contextmanager
def injected(failure: Failure | None) -> Iterator[Injected]:
    """Within it whatever plan serves fails in this way; None: nothing fails, and what runs is counted."""
    found, running = Injected(), Variant.running

    @contextmanager
    def watched(self: Variant, phase: Any) -> Iterator[Any]:
        found.entered += 1
        inside = failure is not None and failure.place in ("operation", "alarm")
        with running(self, phase) as module, ExitStack() as stack:
            if inside and failure is not None:
                stack.enter_context(_FailAt(failure, found))
            yield module

    def fail(*_: Any, **__: Any) -> Any:
        found.fired += 1
        assert failure is not None
        raise ERRORS[failure.error]()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Variant, "running", watched))
        if failure is not None and failure.place == "slots":
            stack.enter_context(mock.patch.object(pool, "SlotCache", fail))
        if failure is not None and failure.place == "step":
            stack.enter_context(mock.patch.object(program.StepPrograms, "fitting", fail))
        if failure is not None and failure.place == "alarm":
            stack.enter_context(_handler())
        yield found


@contextmanager
def _handler() -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise Late("the time is over")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        # Another thread may still run the call that an alarm has ended here: its next alarm must not end the process.
        signal.signal(signal.SIGALRM, signal.SIG_IGN if before is signal.SIG_DFL else before)
