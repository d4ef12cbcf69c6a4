"""What is delivered from outside is not taken for the failure of what it interrupted."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from autotune.machine import outside
from autotune.runtime.variant import Variant


class LateError(Exception):
    """A user's own."""


@contextmanager
def alarm(handler: Callable[..., None], after_s: float = 0.05) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ring(number: int, frame: object) -> None:
    raise LateError("too late")


def busy() -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pass


def guarded(work: Callable[[], object]) -> str:
    """As a trial does it."""
    try:
        work()
    except Exception as error:
        outside.pass_on(error)
        return f"failed: {error}"
    return "fine"


def wrapping() -> None:
    try:
        busy()
    except Exception as error:
        raise RuntimeError("a library's own words") from error


@pytest.mark.parametrize("work", [busy, wrapping])
@pytest.mark.parametrize("handler", [ring, lambda *given: ring(*given)])
def test_an_alarm_reaches_whoever_set_it(work: Callable[[], None], handler: Callable[..., None]) -> None:
    with alarm(handler), pytest.raises(LateError):
        guarded(work)


def test_what_another_thread_raises_reaches_whom_it_is_for() -> None:
    kind = ctypes.py_object(LateError)
    own = ctypes.c_ulong(threading.get_ident())
    threading.Timer(0.05, lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(own, kind)).start()
    with pytest.raises(LateError):
        guarded(busy)


def bare() -> None:
    raise LateError


def asserted() -> None:
    assert 1 + 1 == 3


def raised_again() -> None:
    try:
        bare()
    finally:
        sum([])


FAILURES: list[Callable[[], object]] = [
    bare,
    asserted,
    raised_again,
    lambda: ring(1, None),
    lambda: 1 / 0,
    lambda: {}["x"],
    lambda: next(iter([])),
    lambda: torch.ones(2) @ torch.ones(3),
    lambda: torch.empty(1 << 60),
]


@pytest.mark.parametrize("work", FAILURES)
def test_a_failure_of_its_own_stays_one(work: Callable[[], object]) -> None:
    assert guarded(work).startswith("failed")


def test_a_failure_while_the_caller_handles_an_alarm_is_a_failure() -> None:
    with alarm(ring):
        try:
            busy()
        except LateError:
            assert guarded(bare).startswith("failed")


def test_a_variant_that_is_interrupted_did_not_fail(llama) -> None:
    variant = Variant(llama)
    with alarm(ring), pytest.raises(LateError), variant.running("decode"):
        busy()
