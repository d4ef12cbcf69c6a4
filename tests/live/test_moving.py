"""Weights move while calls are under way, or while something else is asked for."""

# ruff: noqa: F811 - fixtures

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

import autotune
from autotune.live import original
from autotune.live.former import Former
from autotune.live.original import Original
from autotune.live.status import State
from autotune.model import route
from autotune.model.route import is_routed
from autotune.runtime.kernels import available
from autotune.runtime.traffic import Traffic
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.continuous_batching import ContinuousBatching
from autotune.transforms.step_program import StepProgram
from tests.fakes.cuda import FakeCuda
from tests.live.test_parking import gpu, parked  # noqa: F401 - fixtures
from tests.live.test_release import IDS, PACKED, greedy, scripted, wrapped  # noqa: F401 - fixtures
from tests.machine.test_forking import ANSWERED, in_child
from tests.models import tiny
from tests.serve.servers import until

SENTENCE = available()
pytestmark = pytest.mark.skipif(SENTENCE is not None, reason=str(SENTENCE))

TOGETHER = [*PACKED[:2], StepProgram("decode", slots=64), ContinuousBatching("decode", rows=4)]


class Held:
    """A logits processor in which a call stays until it is let go."""

    def __init__(self) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.leave.wait(60)
        return scores


@contextmanager
def under_way(model: Any, **options: Any) -> Iterator[list[list[list[int]]]]:
    """Inside, a call is under way. Its answer is in the list at the end."""
    held, answers = Held(), list[list[list[int]]]()
    call = threading.Thread(target=lambda: answers.append(greedy(model, logits_processor=[held], **options)))
    call.start()
    assert held.entered.wait(60)
    try:
        yield answers
    finally:
        held.leave.set()
        call.join(60)


class Asked(threading.Thread):
    """Asks for something in another thread, and keeps why it was refused."""

    def __init__(self, ask: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._ask = ask
        self.refusal: str | None = None
        self.start()

    def run(self) -> None:
        try:
            self._ask()
        except autotune.StateError as refusal:
            self.refusal = str(refusal)

    def answered(self) -> str | None:
        self.join(60)
        assert not self.is_alive()
        return self.refusal


def waiting(model: Any, threads: int = 1) -> None:
    """Wait until so many threads wait for the call under way."""
    until(lambda: len(model.autotune._tuning._traffic._changed._waiters) == threads)


@contextmanager
def slow(method: str) -> Iterator[threading.Event]:
    """Inside, `Original.release` or `Original.park` waits. The event says that it does."""
    inside, go_on, move = threading.Event(), threading.Event(), getattr(Original, method)

    def wait(self: Original, variant: Variant) -> None:
        inside.set()
        assert go_on.wait(60)
        move(self, variant)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Original, method, wait)
        try:
            yield inside
        finally:
            go_on.set()


def test_the_release_waits_for_calls_under_way(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"))
    before = greedy(model, num_beams=2)
    with under_way(model, num_beams=2) as answers:
        commit = Asked(partial(model.autotune.commit, keep_original=False))
        commit.join(0.1)
        assert model.autotune.status.original == "resident"
    assert commit.answered() is None
    assert model.autotune.status.original == "released"
    assert answers == [before]


def test_the_release_waits_with_an_engine_too(scripted: list[Transform], monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine can be paused between two steps, but calls are then still under way, some of them on the original."""
    monkeypatch.setattr("autotune.runtime.traffic.PATIENCE_S", 0.0)
    scripted[:] = TOGETHER
    model = wrapped(tiny("llama"))
    together = greedy(model)
    model.autotune.rollback()
    before = greedy(model)
    with under_way(model) as answers:
        commit = Asked(partial(model.autotune.commit, keep_original=False))
        until(lambda: model.autotune._tuning._traffic._held_up_by)
        later = Asked(lambda: answers.append(greedy(model)))
        later.join(0.1)
        assert model.autotune.status.original == "resident"
        assert later.is_alive(), "calls that begin later could put the release off for ever"
    assert [commit.answered(), later.answered()] == [None, None]
    assert model.autotune.status.original == "released"
    assert answers == [before, together]


def test_no_engine_decodes_by_what_was_recorded_before_the_release(scripted: list[Transform]) -> None:
    """The engine's thread lingers after the last call, and takes the next one."""
    scripted[:] = TOGETHER
    model = wrapped(tiny("llama"))
    before = greedy(model)
    programs = [weakref.ref(each) for each in model.autotune._winner.tuned.variant.step.programs]
    assert programs
    model.autotune.commit(keep_original=False)
    gc.collect()
    assert [each for each in programs if each() is not None] == []
    assert greedy(model) == before


@pytest.mark.parametrize("transforms", ["alone", "together"])
def test_what_would_wait_for_the_call_that_asks_for_it_is_refused(scripted: list[Transform], transforms: str) -> None:
    scripted[:] = TOGETHER if transforms == "together" else PACKED
    model, said = wrapped(tiny("llama")), list[str]()

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for operation in (partial(model.autotune.commit, keep_original=False), model.autotune.tune):
            with pytest.raises(autotune.StateError, match="within a call of the model"):
                operation()
            said.append(model.autotune.status.state)
        return scores

    greedy(model, tokens=1, logits_processor=[ask])
    assert said == ["tuned", "tuned"]
    assert model.autotune.status.original == "resident"


def test_unwrap_within_a_call_that_tuning_waits_for_is_refused(scripted: list[Transform]) -> None:
    model, said = wrapped(tiny("llama"), when="manual"), list[str]()

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        model.autotune._tuning.thread = Asked(lambda: stepping(model))
        waiting(model)
        with pytest.raises(autotune.StateError, match="within a call of the model"):
            model.autotune.unwrap()
        said.append(model.autotune.status.state)
        return scores

    def stepping(model: Any) -> None:
        with model.autotune._tuning._traffic.step():
            said.append("stepped")

    greedy(model, tokens=1, logits_processor=[ask])
    assert model.autotune._tuning.thread.answered() is None
    assert said == ["waiting", "stepped"]
    model.autotune.unwrap()


@pytest.mark.parametrize("when", ["background", "another thread"])
def test_unwrap_during_a_release_is_refused(scripted: list[Transform], when: str) -> None:
    with slow("release") as inside:
        if when == "background":
            model = wrapped(tiny("llama"), when="background", keep_original=False)
        else:
            model = wrapped(tiny("llama"))
            Asked(partial(model.autotune.commit, keep_original=False))
        handle = model.autotune
        assert inside.wait(60)
        unwrap = Asked(handle.unwrap)
        until(lambda: handle._tuning._traffic.cancelled)
    assert "cannot unwrap" in str(unwrap.answered())
    assert (handle.status.state, handle.status.original) == ("tuned", "released")
    assert not handle._tuning._traffic.cancelled, "what was refused has stopped the watch"
    assert len(greedy(model)[0]) == IDS.shape[1] + 8


def test_an_edit_while_the_release_waits_is_no_part_of_the_plan(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"))
    with under_way(model):
        commit = Asked(partial(model.autotune.commit, keep_original=False))
        waiting(model)
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
    assert "stale: tensor model.norm.weight was written to" in str(commit.answered())
    assert model.autotune.status.original == "resident"
    with pytest.warns(RuntimeWarning, match="was written to"):
        greedy(model)
    assert model.autotune.status.state == "stale"


BEFORE = Former(None, None, None, State.ORIGINAL, "as before", False)
MEANWHILE: dict[str, tuple[Callable[[Any], object], str]] = {
    "rolled back": (lambda model: model.autotune.rollback(), "the plan no longer serves"),
    "original": (lambda model: model.autotune.restore(BEFORE), "the plan no longer serves"),
    "tuned": (lambda model: route.add_layer(model, route.Plain()), "an experiment runs on the model"),
}


@pytest.mark.parametrize("state", MEANWHILE)
def test_a_release_that_waits_is_refused_if_something_else_serves_meanwhile(
    scripted: list[Transform], state: str
) -> None:
    model, (ask, said) = tiny("llama"), MEANWHILE[state]
    answer = greedy(model)
    wrapped(model)
    with under_way(model):
        commit = Asked(partial(model.autotune.commit, keep_original=False))
        waiting(model)
        ask(model)
    assert said in str(commit.answered())
    assert (model.autotune.status.state, model.autotune.status.original) == (state, "resident")
    assert state == "tuned" or greedy(model) == answer
    model.autotune.unwrap().state_dict()


def test_a_release_that_was_refused_is_no_failure_of_tuning(
    scripted: list[Transform], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    answer = greedy(model)
    wrapped(model, when="manual", keep_original=False)
    with under_way(model):
        tune = Asked(model.autotune.tune)
        until(lambda: model.autotune.status.state == "tuned")
        model.autotune.rollback()
    assert tune.answered() is None
    assert "the original stays beside the plan" in caplog.text
    assert (model.autotune.status.state, model.autotune.status.original) == ("rolled back", "resident")
    assert greedy(model) == answer


@pytest.mark.parametrize("place", [False, "parked"])
def test_what_served_before_needs_the_original(gpu: FakeCuda, place: Any) -> None:
    model = wrapped(tiny("llama"))
    before = greedy(tiny("llama"))
    former = Former(None, None, None, State.ORIGINAL, "as before", False)  # what `adopt` returned
    model.autotune.commit(keep_original=place)
    if place == "parked":
        model.autotune.restore(former)
        assert (model.autotune.status.state, model.autotune.status.original) == ("original", "resident")
        assert greedy(model) == before
    else:
        with pytest.raises(autotune.StateError, match="cannot serve with what served before"):
            model.autotune.restore(former)
        assert model.autotune.status.state == "tuned"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_that_is_forked_during_a_release_has_the_original(
    scripted: list[Transform], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on, move = threading.Event(), threading.Event(), original._move

    def wait(*given: Any) -> None:
        inside.set()
        assert go_on.wait(60)
        move(*given)

    monkeypatch.setattr(original, "_move", wait)
    model = tiny("llama")
    answer = greedy(model)
    wrapped(model)
    commit = Asked(partial(model.autotune.commit, keep_original=False))
    assert inside.wait(60)

    def in_the_child() -> bool:
        model.autotune.unwrap()
        return greedy(model) == answer and bool(model.state_dict())

    assert in_child(in_the_child) == ANSWERED
    go_on.set()
    assert commit.answered() is None


def test_rollback_during_a_release_is_refused(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"))
    tuned = greedy(model)
    with slow("release") as inside:
        commit = Asked(partial(model.autotune.commit, keep_original=False))
        assert inside.wait(60)
        rollback = Asked(model.autotune.rollback)
        rollback.join(0.1)
    assert "cannot roll back" in str(rollback.answered())
    assert commit.answered() is None
    assert (model.autotune.status.state, model.autotune.status.original) == ("tuned", "released")
    assert greedy(model) == tuned


def test_a_release_lets_what_is_left_of_an_abandoned_sequence_call_the_model(scripted: list[Transform]) -> None:
    """As `guidance_scale` does at each token: the caller has left, but the engine is in the middle of a step."""
    scripted[:] = TOGETHER
    model = wrapped(tiny("llama"))
    tuned, traffic = greedy(model), model.autotune._tuning._traffic
    entered, asked = threading.Event(), list[int]()

    class Left(Exception): ...

    class Leaves:
        """A streamer that raises at the first token."""

        puts = 0

        def put(self, value: torch.Tensor) -> None:
            self.puts += 1
            if self.puts == 2:
                assert entered.wait(60)
                raise Left

        def end(self) -> None: ...

    def guide(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == IDS.shape[1] + 1:
            entered.set()
            until(lambda: traffic._has_step)
            model(ids)
            asked.append(ids.shape[1])
        return scores

    with pytest.raises(Left):
        greedy(model, streamer=Leaves(), logits_processor=[guide])
    assert Asked(partial(model.autotune.commit, keep_original=False)).answered() is None
    assert asked == [IDS.shape[1] + 1]
    assert model.autotune.status.original == "released"
    assert greedy(model) == tuned


@pytest.mark.parametrize("first", ["release", "rollback"])
def test_of_a_release_and_a_rollback_that_wait_the_second_is_refused(
    gpu: FakeCuda, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waited decides by what it finds then."""
    model = tiny("llama")
    answer = greedy(model)
    handle = parked(model).autotune
    tuned, enter, arrived = greedy(model), Traffic._enter, threading.Event()
    asks: dict[str, Callable[[], object]] = {
        "release": partial(handle.commit, keep_original=False),
        "rollback": handle.rollback,
    }
    with under_way(model):
        earlier = Asked(asks.pop(first))
        waiting(model)

        def after_it(self: Traffic, *args: Any) -> Any:
            arrived.set()
            assert earlier.answered() is None
            return enter(self, *args)

        monkeypatch.setattr(Traffic, "_enter", after_it)
        later = Asked(asks.popitem()[1])
        assert arrived.wait(60)
    refusal = str(later.answered())
    if first == "release":
        assert "cannot roll back" in refusal
        assert (handle.status.state, handle.status.original) == ("tuned", "released")
        assert greedy(model) == tuned
    else:
        assert "the plan no longer serves" in refusal
        assert (handle.status.state, handle.status.original) == ("rolled back", "resident")
        assert greedy(model) == answer


def test_two_rollbacks_that_wait_drop_a_plan_once(gpu: FakeCuda) -> None:
    model = tiny("llama")
    answer = greedy(model)
    handle = parked(model).autotune
    gpu.free_bytes = 1000
    with under_way(model):
        asked = [Asked(handle.rollback), Asked(handle.rollback)]
        waiting(model, 2)
    assert [each.answered() for each in asked] == [None, None]
    assert handle.status.state == "original"
    assert "the plan was dropped" in handle.status.detail
    assert greedy(model) == answer


@pytest.mark.parametrize("ask", ["unwrap", "rollback"])
def test_what_needs_the_original_while_it_is_being_parked_brings_it_back(gpu: FakeCuda, ask: str) -> None:
    model = tiny("llama")
    expected = copy.deepcopy(model.state_dict())
    with slow("park") as inside:
        handle = wrapped(model, when="background", keep_original="parked").autotune
        assert inside.wait(60)
        asked = Asked(getattr(handle, ask))
        if ask == "unwrap":
            until(lambda: handle._tuning._traffic.cancelled)
        else:
            asked.join(0.1)
    assert asked.answered() is None
    assert is_routed(model) == (ask == "rollback")
    assert ask == "unwrap" or handle.status.state == "rolled back"
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
