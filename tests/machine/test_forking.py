"""A child process answers, whatever the parent's threads were at when it was forked."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import autotune
from autotune.machine import forking
from autotune.runtime.traffic import Traffic
from autotune.tune import run as tuning
from tests.live.test_wrap import greedy, scripted, wrapped  # noqa: F401 - a fixture
from tests.models import tiny, token_prompts

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
ANSWERED, FAILED = 0, 1
PATIENCE_S = 60.0  # a child that waits for a thread it does not have waits for ever


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """OpenMP's own threads do not outlive a fork either; servers that fork compute with one before it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_child(work: Callable[[], bool]) -> int:
    """The exit code of a child that does `work`: ANSWERED where that is True; -SIGKILL where it never ended."""
    child = os.fork()
    if not child:
        code = FAILED
        try:
            code = ANSWERED if work() else FAILED
        finally:
            os._exit(code)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def elsewhere(held: Any) -> Iterator[None]:
    """`held` is entered by another thread meanwhile."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with held:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def enter(held: Any) -> bool:
    with held:
        return True


@pytest.mark.parametrize(
    "make", [forking.lock, lambda: forking.free(threading.RLock()), lambda: forking.free(threading.Condition())]
)
def test_a_lock_that_another_thread_holds_is_free(make: Callable[[], Any]) -> None:
    lock = make()
    with elsewhere(lock):
        assert in_child(lambda: enter(lock)) == ANSWERED


@pytest.mark.parametrize("theirs", ["request", "step"])
@pytest.mark.parametrize("ours", ["request", "step"])
def test_nobody_waits_for_a_step_or_a_request_of_the_parents(theirs: str, ours: str) -> None:
    traffic = Traffic()
    with elsewhere(getattr(traffic, theirs)()):
        assert in_child(lambda: enter(getattr(traffic, ours)())) == ANSWERED


def test_a_fork_in_the_middle_of_a_request_of_its_own() -> None:
    traffic = Traffic()

    def leave_and_go_on(request: Any) -> bool:
        request.__exit__(None, None, None)
        return enter(traffic.step())

    request = traffic.request()
    with request:
        assert in_child(lambda: leave_and_go_on(request)) == ANSWERED


@pytest.mark.fault("D61")
def test_a_child_of_a_process_that_tunes_answers_and_tunes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring, leave = threading.Event(), threading.Event()

    def tune(*_: Any, traffic: Traffic, **__: Any) -> Any:
        with traffic.step():
            measuring.set()
            leave.wait()
        raise autotune.MeasurementError("enough")

    monkeypatch.setattr(tuning, "tune", tune)
    model = tiny("llama")
    expected = greedy(model)
    autotune.wrap(model, workload=token_prompts(2), when="background", cache=False)
    assert measuring.wait(PATIENCE_S)

    def answers() -> bool:
        served, status = greedy(model), model.autotune.status
        leave.set()
        with pytest.raises(autotune.MeasurementError):
            model.autotune.tune()
        return served == expected and status.state == "observing" and "forked" in status.detail

    def end() -> None:
        leave.set()
        model.autotune._tuning.thread.join()

    assert in_child(answers) == ANSWERED
    with pytest.warns(RuntimeWarning, match="enough"):
        end()
    model.autotune.unwrap()


@pytest.mark.fault("D61")
def test_a_plan_serves_in_a_child(scripted: list[Any]) -> None:  # noqa: F811
    model = tiny("llama")
    expected = greedy(model)
    wrapped(model)
    assert in_child(lambda: bool(greedy(model) == expected and model.autotune.status.served == 1)) == ANSWERED
