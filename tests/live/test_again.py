"""A search whose outcome noise may have hidden is repeated, on a clock and with rests that the test makes."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from autotune.live.again import PAUSES_S, Again
from autotune.machine import ending
from autotune.runtime.traffic import Traffic
from autotune.runtime.variant import Variant
from autotune.tune import plan as plans
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.tuned import Tuned
from tests.live.test_wrap import Written, wrapped
from tests.models import tiny

KEPT = "kept the original: none of 2 candidates tried proved both faster and no worse (1 inconclusive)"
FOR_NOW = KEPT.replace("original", "original for now")


class Time:
    """A clock that moves on by every rest, during which `happens` happens."""

    def __init__(self, happens: Callable[[], object] = lambda: None) -> None:
        self.now_s = 0.0
        self.rests = list[float]()
        self.happens = happens

    def clock(self) -> float:
        return self.now_s

    def rest(self, seconds: float) -> bool:
        self.rests.append(seconds)
        self.now_s += seconds
        return bool(self.happens())


class Searches:
    """Finds noise as often as it is told to."""

    def __init__(self, noisy: list[bool]) -> None:
        self.noisy = noisy
        self.tries = list[bool]()

    def tune(self, work: Any, again: bool) -> bool:
        self.tries.append(again)
        return self.noisy.pop(0)


# whether noise may have hidden a gain, search by search -> rests before the next
COURSES = {
    "sure at once": ([False], []),
    "sure the second time": ([True, False], [600.0]),
    "sure the third time": ([True, True, False], [600.0, 1200.0]),
    "never sure": ([True, True, True, True], [600.0, 1200.0, 2400.0]),
}


@pytest.mark.parametrize(("noisy", "rests"), COURSES.values(), ids=COURSES)
def test_rests_become_longer_and_there_are_three(noisy: list[bool], rests: list[float]) -> None:
    time, searches, count = Time(), Searches(list(noisy)), len(noisy)
    Again(time.rest, time.clock).keep_trying(weakref.WeakMethod(searches.tune), None)
    assert time.rests == rests
    assert searches.tries == [False] + [True] * (count - 1)


ENDINGS = {
    "called off": lambda again, _: True,
    "dropped": lambda again, _: again.drop(),
    "forked": lambda again, _: again.after_fork(),
    "gone": lambda _, subjects: subjects.clear(),
}


@pytest.mark.parametrize("happens", ENDINGS.values(), ids=ENDINGS)
def test_a_rest_may_be_the_end(happens: Callable[..., Any]) -> None:
    subjects = [Searches([True, True])]
    tries = subjects[0].tries
    time = Time(lambda: happens(again, subjects))
    again = Again(time.rest, time.clock)
    again.keep_trying(weakref.WeakMethod(subjects[0].tune), None)
    assert time.rests == [600.0]
    assert tries == [False]
    assert again.said(KEPT) == KEPT


def test_the_outcome_says_when_it_is_tried_again() -> None:
    said = list[str]()

    def wait() -> None:
        time.now_s -= 90.0  # a minute and a half is left
        said.append(again.said(KEPT))

    time = Time(wait)
    again = Again(time.rest, time.clock)
    searches = Searches([True, False])
    assert again.said(KEPT) == KEPT
    again.keep_trying(weakref.WeakMethod(searches.tune), None)
    assert said == [f"{FOR_NOW}; tried again in 1 min 30 s"]
    assert again.said(KEPT) == KEPT


def test_a_rest_ends_as_soon_as_tuning_is_called_off() -> None:
    traffic, found = Traffic(), list[bool]()
    thread = threading.Thread(target=lambda: found.append(traffic.rest(3600.0)))
    thread.start()
    traffic.cancel()
    thread.join(60)
    assert found == [True]
    assert not Traffic().rest(0.0)


# A wrapped model, whose searches keep the original for noise: what is scripted is the search, and the rests


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(Traffic, "rest", lambda _, seconds: time.rest(seconds))
    return time


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether noise may have hidden a gain, of each search to come; what was searched is taken out."""
    noisy = [True] * 9

    def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        plan = plans.Plan(Fingerprint("", "", {}, "", "", "strict"), ())
        hidden = noisy.pop(0)
        doubt = "1 of 2 candidates came out inconclusive" if hidden else None
        return Tuned(Variant(model, traffic, workload), plan, Written(), KEPT, doubt, hidden)

    monkeypatch.setattr(tuning, "tune", tune)
    return noisy


def background(model: Any) -> Any:
    return wrapped(model, when="background")


def test_in_the_background_noise_is_waited_out(searches: list[bool], rests: Time) -> None:
    details = list[str]()
    searches[:] = [True, True, False]
    model = tiny("llama")
    rests.happens = lambda: details.append(model.autotune.status.detail)
    handle = background(model).autotune
    handle._tuning.thread.join(60)
    assert rests.rests == [600.0, 1200.0]
    assert [detail.rpartition(" in ")[0] for detail in details] == [f"{FOR_NOW}; tried again"] * 2
    assert (searches, handle.status.state, handle.status.detail) == ([], "original", KEPT)


@pytest.mark.parametrize("when", ["blocking", "manual"])
def test_where_a_caller_waits_nothing_is_repeated(when: str, searches: list[bool], rests: Time) -> None:
    model = wrapped(tiny("llama"), when=when)
    if when == "manual":
        model.autotune.tune()
    assert rests.rests == []
    assert len(searches) == 8
    assert model.autotune.status.detail == KEPT


def meanwhile(model: Any) -> dict[str, Callable[[], Any]]:
    """What may happen during a rest after which nothing is tuned again."""
    handle = model.autotune
    return {
        "rollback": handle.rollback,
        "training": model.train,
        "other weights": lambda: model.load_state_dict(tiny("llama", seed=7).state_dict()),
        "another tuning": lambda: handle._tuning.lock.acquire(blocking=False),
        "tuned by hand": handle.tune,
        "the process ends": lambda: True,
    }


EVENTS = ("rollback", "training", "other weights", "another tuning", "tuned by hand", "the process ends")


@pytest.mark.parametrize("event", EVENTS)
def test_what_changed_since_is_not_tuned_again(event: str, searches: list[bool], rests: Time) -> None:
    model = tiny("llama")
    ends = {"the process ends"}
    rests.happens = lambda: bool(meanwhile(model)[event]()) and event in ends
    background(model).autotune._tuning.thread.join(60)
    assert rests.rests == [PAUSES_S[0]]
    assert len(searches) == (7 if event == "tuned by hand" else 8)


def test_unwrap_ends_the_rest(searches: list[bool]) -> None:
    model = background(tiny("llama"))
    handle = model.autotune
    handle.unwrap()
    assert not handle._tuning.thread.is_alive()
    assert len(searches) >= 8


def test_a_model_that_nobody_uses_is_free_during_the_rest(
    searches: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    resting, go_on = threading.Event(), threading.Event()

    def rest(_: Traffic, seconds: float) -> bool:
        resting.set()
        return not go_on.wait(60)

    monkeypatch.setattr(Traffic, "rest", rest)
    model = background(tiny("llama"))
    thread, weights = model.autotune._tuning.thread, weakref.ref(model.lm_head.weight)
    assert resting.wait(60)
    assert isinstance(thread, ending.Worker)
    del model
    gc.collect()
    assert weights() is None
    go_on.set()
    thread.join(60)
    assert len(searches) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_does_not_promise_what_its_parent_does() -> None:
    answers = list[int]()

    def fork() -> bool:
        child = os.fork()
        if not child:
            os._exit(0 if again.said(KEPT) == KEPT else 1)
        answers.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return True

    time = Time(fork)
    again = Again(time.rest, time.clock)
    searches = Searches([True])
    again.keep_trying(weakref.WeakMethod(searches.tune), None)
    assert answers == [0]
