"""Live requests and measured steps take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context

import pytest

from autotune.errors import RequestError, StateError
from autotune.machine.ending import Cancelled
from autotune.runtime.batching.terms import CURRENT, RequestTerms
from autotune.runtime.traffic import PATIENCE_S, SHARE, Traffic

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


# Requests that never end: they are paused


class Engine:
    """Notes when it is paused."""

    def __init__(self) -> None:
        self.paused, self.count = False, 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused = True
        self.count += 1
        yield
        self.paused = False


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.runtime.traffic.PATIENCE_S", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_step_pauses_requests_that_never_end() -> None:
    traffic, engine, came = Traffic(), Engine(), threading.Event()
    traffic.pause_by(lambda: engine.pause)
    over, seen = threading.Event(), []

    def endless() -> None:
        with traffic.request():
            over.wait(WAIT_S)

    def late() -> None:
        with traffic.request():
            seen.append(engine.paused)
            came.set()

    thread = start(endless)
    while traffic.begun < 1:
        over.wait(0.001)
    with traffic.step():
        assert engine.paused
        with traffic.step():  # a step within it has the same turn
            assert engine.count == 1
        newcomer = start(late)
        assert not came.wait(0.05), "a request began while the others were paused"
    assert came.wait(WAIT_S)
    assert seen == [False]
    over.set()
    thread.join(WAIT_S)
    newcomer.join(WAIT_S)


@pytest.mark.usefixtures("impatient")
def test_a_step_that_waits_for_its_pause_holds_up_other_steps_and_no_request() -> None:
    """Who has the model until then may call it once more, and is to be done before it is paused."""
    traffic, model, waits, asked = Traffic(), threading.Lock(), threading.Event(), threading.Event()
    steps = list[bool]()

    @contextmanager
    def pause() -> Iterator[None]:
        assert not waits.is_set(), "another step waits already"
        waits.set()
        with model:
            yield
        waits.clear()

    traffic.pause_by(lambda: pause)

    def busy() -> None:
        with traffic.request(), model:
            assert waits.wait(WAIT_S)
            with traffic.request():
                asked.set()

    def step() -> None:
        with traffic.step():
            steps.append(asked.is_set())

    threads = [start(busy)]
    while not model.locked():
        assert threads[0].is_alive()
    threads += [start(step), start(step)]
    for thread in threads:
        thread.join(WAIT_S)
    assert steps == [True, True]


@pytest.mark.usefixtures("impatient")
def test_a_step_that_was_cancelled_while_it_waited_for_its_pause_does_not_begin() -> None:
    """Who cancelled it waits for a step in progress, and then for none."""
    traffic, waits, go_on, seen = Traffic(), threading.Event(), threading.Event(), list[str]()

    @contextmanager
    def pause() -> Iterator[None]:
        waits.set()
        assert go_on.wait(WAIT_S)
        yield

    traffic.pause_by(lambda: pause)

    def step() -> None:
        try:
            with traffic.step():
                seen.append("step")
        except Cancelled:
            seen.append("cancelled")

    with traffic.request():
        stepping = start(step)
        assert waits.wait(WAIT_S)
        traffic.cancel()
        traffic.settle()
        go_on.set()
        stepping.join(WAIT_S)
    assert seen == ["cancelled"]


def test_a_step_pauses_nobody_where_no_request_is_in_flight() -> None:
    traffic, engine = Traffic(), Engine()
    traffic.pause_by(lambda: engine.pause)
    with traffic.step():
        assert engine.count == 0


def test_requests_are_paused_for_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made-up clock: after a step of two seconds they run for eighteen, and every step is patient at first."""
    now, waits = [100.0], list[float]()

    class Clock:
        perf_counter = monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr("autotune.runtime.traffic.time", Clock)
    traffic, engine = Traffic(), Engine()

    def pass_by(seconds: float | None = None) -> bool:
        assert seconds is not None
        waits.append(seconds)
        now[0] += seconds
        return True

    monkeypatch.setattr(traffic._changed, "wait", pass_by)
    traffic.pause_by(lambda: engine.pause)
    with traffic.request():
        with traffic.step():
            now[0] += 2.0
        with traffic.step():
            pass
    assert waits == [PATIENCE_S, pytest.approx(2.0 / SHARE - 2.0)]
    assert engine.count == 2
    assert traffic.clock() == pytest.approx(102.0), "waiting was counted as work"


@pytest.mark.usefixtures("impatient")
def test_a_plan_that_went_out_of_service_pauses_nobody() -> None:
    traffic, over, stepped = Traffic(), threading.Event(), threading.Event()

    def endless() -> None:
        with traffic.request():
            over.wait(WAIT_S)

    def step() -> None:
        with traffic.step():
            stepped.set()

    request = start(endless)
    while traffic.begun < 1:
        over.wait(0.001)
    stepping = start(step)
    assert not stepped.wait(0.05)
    over.set()
    assert stepped.wait(WAIT_S)
    request.join(WAIT_S)
    stepping.join(WAIT_S)


# A step that needs a moment without requests


def holding(traffic: Traffic, steps: list[str]) -> threading.Thread:
    """A step that does not pause and holds new requests up already."""

    def step() -> None:
        with traffic.step(pauses=False):
            steps.append("step")

    thread = start(step)
    while not traffic._held_up_by:
        assert thread.is_alive()
    return thread


@pytest.mark.usefixtures("impatient")
def test_a_step_that_does_not_pause_holds_up_new_requests_and_none_within_others() -> None:
    traffic, engine, seen = Traffic(), Engine(), list[str]()
    traffic.pause_by(lambda: engine.pause)

    def late() -> None:
        with traffic.request():
            seen.append("request")

    with traffic.request():
        stepping = holding(traffic, seen)
        newcomer = start(late)
        within = copy_context()  # an engine's thread calls a caller's objects in the caller's context
        late()
        start(lambda: within.run(late)).join(WAIT_S)
        assert seen == ["request"] * 2
        assert newcomer.is_alive()
    for thread in (stepping, newcomer):
        thread.join(WAIT_S)
    assert seen == ["request", "request", "step", "request"]
    assert engine.count == 0


@pytest.mark.usefixtures("impatient")
def test_a_request_is_not_held_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is under way may wait for it in another thread."""
    monkeypatch.setattr("autotune.runtime.traffic.HELD_S", 0.01)
    traffic, seen = Traffic(), list[str]()

    def late() -> None:
        with traffic.request():
            seen.append("request")

    with traffic.request():
        stepping = holding(traffic, seen)
        start(late).join(WAIT_S)
    stepping.join(WAIT_S)
    assert seen == ["request", "step"]


@pytest.mark.usefixtures("impatient")
def test_a_step_in_progress_makes_its_requests_while_another_one_holds_new_ones_up() -> None:
    traffic, seen = Traffic(), list[str]()
    over = threading.Event()

    def endless() -> None:
        with traffic.request():
            over.wait(WAIT_S)

    engine = Engine()
    traffic.pause_by(lambda: engine.pause)
    thread = start(endless)
    while traffic.begun < 1:
        assert thread.is_alive()
    stepping = holding(traffic, seen)
    with traffic.step(), traffic.request():
        assert seen == []
    over.set()
    for each in (thread, stepping):
        each.join(WAIT_S)
    assert seen == ["step"]


def test_a_step_within_a_request_that_it_would_wait_for_is_refused() -> None:
    traffic, other = Traffic(), Traffic()
    with traffic.request():
        assert (traffic.is_inside(), other.is_inside()) == (True, False)
        kept = copy_context()
        for pauses in (True, False):
            with pytest.raises(StateError, match="within a call"), traffic.step(pauses=pauses):
                pass
        with other.step():
            pass
    assert not kept.run(traffic.is_inside), "the request is over"
    with traffic.step():
        pass


def test_a_step_within_a_request_is_refused_also_while_another_step_waits_for_it() -> None:
    """A canary has its turn, and waits for the engine's, which the request holds."""
    traffic, pausing, refused = Traffic(), threading.Event(), list[StateError]()
    traffic.pause_by(lambda: pause)

    @contextmanager
    def pause() -> Iterator[None]:
        pausing.set()
        over.wait(10 * WAIT_S)
        yield

    over = threading.Event()

    def call() -> None:
        try:
            with traffic.step(pauses=False):
                pass
        except StateError as refusal:
            refused.append(refusal)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("autotune.runtime.traffic.PATIENCE_S", 0.0)
        with traffic.request():
            context = copy_context()
            canary = start(lambda: holding_step(traffic))
            assert pausing.wait(WAIT_S)
            asking = start(lambda: context.run(call))
            asking.join(WAIT_S)
            assert not asking.is_alive()
            over.set()
    canary.join(WAIT_S)
    assert len(refused) == 1


def holding_step(traffic: Traffic) -> None:
    with traffic.step():
        pass


def test_a_step_that_waits_for_a_rest_lets_what_is_to_rest_make_requests() -> None:
    """An engine calls the objects of a caller who has left, in the context of a request that is over."""
    traffic, entered, seen = Traffic(), threading.Event(), list[str]()
    with traffic.request():
        given_up = copy_context()

    def late(who: str) -> None:
        with traffic.request():
            seen.append(who)

    @contextmanager
    def resting() -> Iterator[None]:
        newcomers.append(start(lambda: late("newcomer")))
        entered.set()
        asking = start(lambda: given_up.run(late, "engine"))
        asking.join(WAIT_S)
        assert not asking.is_alive(), "it waits for the step, which waits for it"
        assert seen == ["engine"], "a request that begins later could put the step off for ever"
        yield

    newcomers = list[threading.Thread]()
    with traffic.step(pauses=False, resting=resting):
        assert entered.is_set()
        assert seen == ["engine"]
    newcomers[0].join(WAIT_S)
    assert seen == ["engine", "newcomer"]


def test_a_step_begins_while_no_request_is_in_flight_also_after_it_waited_for_a_rest() -> None:
    """It does not wait for the request while it holds what the request may need."""
    traffic, rests, seen = Traffic(), threading.Lock(), list[str]()
    with traffic.request():
        given_up = copy_context()
    begun, threads = threading.Event(), list[threading.Thread]()

    def late() -> None:
        with traffic.request():
            begun.set()
            with rests:
                seen.append("request")

    @contextmanager
    def resting() -> Iterator[None]:
        with rests:
            if not threads:
                threads.append(start(lambda: given_up.run(late)))
                assert begun.wait(WAIT_S)
            yield

    with traffic.step(pauses=False, resting=resting):
        assert seen == ["request"]
    threads[0].join(WAIT_S)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "terms", [RequestTerms(cancelled=True), RequestTerms(deadline_s=0.0)], ids=["cancelled", "late"]
)
@pytest.mark.parametrize("for_what", ["held up", "in progress"])
def test_a_request_whose_terms_are_violated_waits_for_no_step(terms: RequestTerms, for_what: str) -> None:
    traffic, seen, came = Traffic(), list[str](), threading.Event()

    def late() -> None:
        CURRENT.set(terms)
        try:
            with traffic.request():
                seen.append("served")
        except RequestError as error:
            seen.append(type(error).__name__)
        came.set()

    if for_what == "held up":
        with traffic.request():
            stepping = holding(traffic, list[str]())
            start(late)
            assert came.wait(WAIT_S)
        stepping.join(WAIT_S)
    else:
        with traffic.step():
            start(late)
            assert came.wait(WAIT_S)
    assert seen == ["CancelledRequestError" if terms.cancelled else "DeadlineError"]
    with traffic.step(), traffic.request():  # and everything was given back
        pass
