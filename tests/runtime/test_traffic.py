"""Live requests and measured steps take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from autotune.machine.ending import Cancelled
from autotune.runtime.traffic import Traffic

WAIT_S = 20.0  # a deadlock shows as a failure, not as a hang


def start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_requests_share_and_a_step_has_the_model_to_itself() -> None:
    traffic, together, stepped = Traffic(), threading.Barrier(2), threading.Event()
    seen: list[str] = []

    def request() -> None:
        with traffic.request():
            together.wait(WAIT_S)  # passes only while both are in flight
            assert not stepped.is_set()
            seen.append("request")

    def step() -> None:
        with traffic.step():
            stepped.set()
            seen.append("step")

    requests = [start(request)]
    with traffic.request():
        stepping = start(step)
        together.wait(WAIT_S)
        assert not stepped.is_set()
    for thread in (*requests, stepping):
        thread.join(WAIT_S)
    assert sorted(seen) == ["request", "step"]


@pytest.mark.fault("D65")
def test_a_request_waits_for_the_step_in_progress_and_for_no_other() -> None:
    traffic, started, finish, served = Traffic(), threading.Event(), threading.Event(), threading.Event()
    request_went_first: list[bool] = []

    def tuner() -> None:
        with traffic.step():
            started.set()
            finish.wait(WAIT_S)
        with traffic.step():
            request_went_first.append(served.is_set())

    def request() -> None:
        with traffic.request():
            served.set()

    tuning = start(tuner)
    assert started.wait(WAIT_S)
    asking = start(request)
    while traffic._requests == 0:
        assert asking.is_alive()
    assert not served.is_set()
    finish.set()
    for thread in (asking, tuning):
        thread.join(WAIT_S)
    assert request_went_first == [True]


def test_a_measured_call_may_nest_a_request_and_a_step() -> None:
    traffic = Traffic()
    with traffic.step(), traffic.request(), traffic.step():
        pass
    with traffic.step():  # and everything was given back
        pass


def test_the_clock_stands_still_while_a_step_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic, now = Traffic(), [100.0]
    monkeypatch.setattr("autotune.runtime.traffic.time.perf_counter", lambda: now[0])
    spans: list[float] = []

    def tuner() -> None:
        before = traffic.clock()
        with traffic.step():
            spans.append(traffic.clock() - before)

    with traffic.request():
        tuning = start(tuner)
        while not traffic._changed._waiters:  # type: ignore[attr-defined]
            assert tuning.is_alive()
        now[0] += 5.0
    tuning.join(WAIT_S)
    assert spans == [0.0]
    assert traffic.clock() == 100.0


@pytest.mark.parametrize("busy", [True, False])
def test_cancelling_wakes_and_stops_the_tuner(busy: bool) -> None:
    traffic, stopped = Traffic(), threading.Event()

    def tuner() -> None:
        try:
            with traffic.step():
                pass
        except Cancelled:
            stopped.set()

    if busy:
        with traffic.request():
            tuning = start(tuner)
            traffic.cancel()
            assert stopped.wait(WAIT_S)
    else:
        traffic.cancel()
        tuning = start(tuner)
    tuning.join(WAIT_S)
    assert stopped.is_set()


def test_a_request_knows_whether_others_were_in_flight() -> None:
    traffic = Traffic()
    with traffic.request() as first:
        assert not first.is_crowded()
        with traffic.request() as second:
            assert first.is_crowded()
            assert second.is_crowded()
        assert first.is_crowded(), "the other one has ended, but it was there"
    with traffic.request() as third:
        assert not third.is_crowded()
