"""Watching a committed plan: the breaker and the rules as tables, and real tiny models that go wrong after commit."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import autotune
from autotune.live.watch.breaker import Breaker, BreakerEvent, Cause, Rules
from autotune.live.watch.canary import score
from autotune.live.watch.drift import (
    COMPILED_CALLS,
    FIRST_CALLS,
    LOOKED_AT,
    Compilations,
    DivergenceCusum,
    LatencyCusum,
    Shape,
    paces_at_commit,
    shape_of,
)
from autotune.live.watch.paces import Kind
from autotune.live.watch.watch import Watch
from autotune.runtime.variant import Variant
from autotune.transforms.lean_loop import LeanLoop
from autotune.tune import plan as plans
from autotune.tune import run as tuning
from autotune.tune import store
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.tuned import Tuned
from autotune.validate import BucketTimes, Latency, Speedup, Verdict
from tests.live.test_wrap import IDS, Written, greedy
from tests.machine.test_forking import ANSWERED, in_child
from tests.models import tiny, token_prompts
from tests.surroundings import without_threads

RULES = Rules(pause_s=10, longest_s=35, most_flaps=3, steady_s=100)
PRINT = Fingerprint("m", "h", {}, "w", "p", "strict")


class Clock:
    """Seconds that pass when told; every reading may take some."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tick = 0.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


pytestmark = pytest.mark.usefixtures("one_thread")


# The breaker


@pytest.mark.parametrize(
    ("events", "phase", "flaps"),
    [
        ([], "closed", 0),
        ([("asked", 0), ("served", 1)], "closed", 0),
        ([("failed", 1)], "open", 1),
        ([("failed", 1), ("asked", 10)], "open", 1),
        ([("failed", 1), ("asked", 11)], "half-open", 1),
        ([("failed", 1), ("served", 2), ("failed", 3)], "open", 1),  # calls from before it opened
        ([("failed", 1), ("asked", 11), ("asked", 12)], "half-open", 1),
        ([("failed", 1), ("asked", 11), ("served", 12)], "closed", 1),
        ([("failed", 1), ("asked", 11), ("failed", 12), ("asked", 31)], "open", 2),  # twice as long
        ([("failed", 1), ("asked", 11), ("failed", 12), ("asked", 32)], "half-open", 2),
        ([("failed", 1), ("asked", 11), ("abandoned", 12), ("asked", 12)], "half-open", 1),
        ([("failed", 1), ("asked", 11), ("undecided", 12), ("asked", 21)], "open", 1),  # for as long again
        ([("failed", 1), ("asked", 11), ("undecided", 12), ("asked", 22)], "half-open", 1),
        ([("failed", 1), ("cleared", 2)], "closed", 0),
        ([("cleared", 2)], "closed", 0),
        ([("failed", 1), ("asked", 11), ("served", 12), ("failed", 13)], "open", 2),
        ([("failed", 1), ("asked", 11), ("served", 12), ("failed", 112)], "open", 1),  # steady in between
        ([("failed", 1), ("asked", 11), ("failed", 12), ("asked", 32), ("failed", 33), ("asked", 67)], "open", 3),
        ([("failed", 1), ("asked", 11), ("failed", 12), ("asked", 32), ("failed", 33), ("asked", 68)], "half-open", 3),
        ([("failed", t) for t in (1,)] + [("asked", 11), ("failed", 12), ("asked", 32), ("failed", 33), ("asked", 68),
                                          ("failed", 69), ("asked", 10_000)], "disabled", 4),
    ],
)  # fmt: skip
def test_the_breaker(events: list[tuple[Any, float]], phase: str, flaps: int) -> None:
    breaker = Breaker()
    for event, now in events:
        breaker = breaker.after(event, now, RULES)
    assert (breaker.phase, breaker.flaps) == (phase, flaps)


def test_pauses_double_up_to_a_limit() -> None:
    breaker, pauses, now = Breaker(), [], 0.0
    for _ in range(3):
        breaker = breaker.after("failed", now, RULES)
        pauses.append(breaker.pause_s)
        now += breaker.pause_s
        breaker = breaker.after("asked", now, RULES)
    assert pauses == [10, 20, 35]


# The rules


@pytest.mark.parametrize(
    ("klds", "alarmed"),
    [
        ([0.0] * 1000, False),
        ([0.004] * 1000, False),
        ([0.005] * 1000, False),  # at the limit is within it
        ([0.015] * 17, False),
        ([0.015] * 18, True),  # three times the limit
        ([0.0] * 500 + [0.015] * 18, True),  # a long good time is no credit
        ([0.05, 0.0, 0.0, 0.0] * 20, True),  # twice and a half the limit on average
        ([1.0, 1.0], True),
        ([20.0], True),
    ],
)
def test_drift_is_called_when_the_evidence_is_there(klds: list[float], alarmed: bool) -> None:
    found, alarms = DivergenceCusum(0.005), []
    for kld in klds:
        found = found.after(kld)
        alarms.append(found.alarmed)
    assert any(alarms) is alarmed


def test_a_plan_at_its_limit_is_hardly_ever_said_to_drift() -> None:
    rng, alarms, samples = np.random.default_rng(0), 0, 200
    for _ in range(100):
        found = DivergenceCusum(0.005)
        for kld in 0.005 * rng.exponential(size=samples):
            found = found.after(float(kld))
            if found.alarmed:
                alarms += 1
                break
    assert alarms <= 100 * samples / 1000  # a run of 1000 on average at least


@pytest.mark.parametrize(
    ("times", "alarmed"),
    [
        ([1.0] * 200, False),
        ([1.1] * 200, False),
        ([1.0] * 50 + [1.35] * 10, True),
        ([1.0] * 50 + [2.0] * 6, True),
        ([1.0] * 10 + [10.0] + [1.0] * 10, False),  # one outlier
        ([1.0] * 10 + [10.0, 1.0, 10.0] + [1.0] * 10, False),
        ([0.5] * 100, False),
    ],
)
def test_a_lasting_slow_down_is_told_from_an_outlier(times: list[float], alarmed: bool) -> None:
    pace, alarms = LatencyCusum(1.0), []
    for tpot in times:
        pace = pace.after(tpot)
        alarms.append(pace.alarmed)
    assert any(alarms) is alarmed


def test_a_shape_that_was_not_measured_shows_its_pace_itself() -> None:
    pace = LatencyCusum()
    for tpot in [0.01] * FIRST_CALLS:
        assert pace.expected_s is None
        pace = pace.after(tpot)
    assert pace.expected_s == 0.01


def test_what_was_measured_at_commit_is_expected_bucket_by_bucket() -> None:
    one = Speedup(1, 1, 1, 2)
    by = {
        "b1/p64/n32": BucketTimes({"tpot": one}, {"tpot": (0.3, 0.2)}, {"tpot": (0.01, 0.03, 0.05)}),
        "b8/p64/n32": BucketTimes({"tpot": one}, {"tpot": (math.nan,)}, {"tpot": (0.08, 0.1, 0.12)}),
    }
    plan, original = paces_at_commit(Latency(Verdict.PASS, "", one, one, one, 0.0, by))
    assert (plan, original) == ({(1, 6): 0.03, (8, 6): 0.1}, {(1, 6): 0.25})
    assert paces_at_commit(None) == ({}, {})
    assert shape_of(1, 60) == shape_of(1, 64) != shape_of(1, 65)


@pytest.mark.parametrize(
    ("compiled", "storm"),
    [([True] * (COMPILED_CALLS - 1), False), ([True] * COMPILED_CALLS, True), ([True, *[False] * 5] * 20, False)],
)
def test_a_storm_of_compilations(compiled: list[bool], storm: bool) -> None:
    seen = Compilations()
    assert any(seen.note(0, int(c)) for c in compiled) is storm
    assert len(seen.compiled) <= LOOKED_AT


# Real models


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Any:
    """A tiny model with a lean loop committed, every call kept, and the work of the canary done when asked."""

    def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        variant = Variant(model, traffic, workload).with_transforms([LeanLoop()])
        variant.edit("both")
        return Tuned(variant, plans.Plan(PRINT, variant.transforms), Written(), "won")

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(Watch, "_work_when_idle", lambda self: None)
    model: Any = autotune.wrap(tiny("llama"), workload=token_prompts(4), when="blocking", cache=False, watch=1.0)
    watch = model.autotune._serving.watch
    watch.clock = clock
    watch.rules = RULES
    watch.begin(watch._variant, model.autotune.plan, model.autotune._serving.unwatchable)
    return model


def spoil(model: Any) -> torch.Tensor:
    """Noise in the plan's decoding weights, as a stray write would leave; returns what was there."""
    decode = model.autotune._serving.active.modules["decode"]
    weight = decode.model.layers[0].mlp.down_proj.weight
    decode.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(weight + 0.5, requires_grad=False)
    return weight


PLAIN = Kind(shape_of(1, IDS.shape[1]), processes=False)


def serve(model: Any, calls: int = 1, tokens: int = 12, **options: Any) -> None:
    for _ in range(calls):
        model.generate(IDS, max_new_tokens=tokens, min_new_tokens=0, **{"do_sample": False} | options)
        model.autotune._serving.watch.work()


def drifted(model: Any, clock: Clock) -> Any:
    """The watch of a plan that was taken out because it drifted, when its pause has passed."""
    serve(model, tokens=4)
    watch = model.autotune._serving.watch
    watch.failed("made up", Cause.DRIFT)
    clock.now += 10
    return watch


def phases(model: Any) -> list[str]:
    return [event.phase for event in model.autotune.events]


def test_a_sound_plan_stays(watched: Any) -> None:
    serve(watched, 4, tokens=4)
    watch = watched.autotune._serving.watch
    assert phases(watched) == []
    assert watch.divergence.samples > 0
    assert watch.divergence.mean < 1e-6
    assert watched.autotune.status.watch.startswith("closed; ")


@pytest.mark.fault("E69")
def test_a_plan_that_drifts_is_taken_out(watched: Any, clock: Clock) -> None:
    from autotune.model.route import bare

    expected = greedy(bare(watched), tokens=12)
    good = spoil(watched)
    for _ in range(30):
        serve(watched, tokens=4)
        clock.now += 1  # longer than the canary rests
        if phases(watched):
            break
    assert phases(watched)[0] == "open"
    assert watched.autotune.events[0].numbers["mean KLD"] > 0.005
    assert "drifted" in watched.autotune.events[0].reason
    clock.now += 10
    watched.autotune._serving.watch.work()  # the kept call still differs
    assert watched.autotune.status.state == "failed"
    assert greedy(watched, tokens=12) == expected
    # repaired, it comes back without a user's call as the trial
    layer = watched.autotune._serving.active.modules["decode"].model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(good, requires_grad=False)
    clock.now += 100
    watched.autotune._serving.watch.work()
    assert phases(watched) == ["open", "half-open", "open", "half-open", "closed"]
    assert watched.autotune.status.state == "tuned"


@pytest.mark.fault("E69")
def test_nan_after_commit_is_found_at_once(watched: Any) -> None:
    decode = watched.autotune._serving.active.modules["decode"]
    decode.lm_head.weight = torch.nn.Parameter(decode.lm_head.weight * math.nan, requires_grad=False)
    serve(watched)
    assert phases(watched) == ["open"]
    assert "NaN" in watched.autotune.events[0].reason


@pytest.mark.fault("E69")
def test_slower_than_at_commit_is_found_in_a_dozen_calls(watched: Any, clock: Clock) -> None:
    watch = watched.autotune._serving.watch
    watch.share = 0.0
    watch._paces.plan[PLAIN] = LatencyCusum(0.01)
    clock.tick = 0.0101
    serve(watched, 10, tokens=9)
    assert phases(watched) == []
    clock.tick = 0.0135
    serve(watched, 9, tokens=9)
    assert phases(watched) == ["open"]
    assert watched.autotune.events[0].numbers["expected"] == pytest.approx(10)


@pytest.mark.parametrize("drawn", [{"do_sample": True}, {"repetition_penalty": 1.3}])
def test_drawing_a_token_takes_its_own_time(watched: Any, clock: Clock, drawn: dict[str, Any]) -> None:
    """What was expected at commit is of calls without it; then calls like these are compared with each other."""
    watch = watched.autotune._serving.watch
    watch.share = 0.0
    watch._paces.plan[PLAIN] = LatencyCusum(0.01)
    clock.tick = 0.0135
    serve(watched, 30, tokens=9, **drawn)
    assert phases(watched) == []
    clock.tick = 0.02
    serve(watched, 9, tokens=9, **drawn)
    assert phases(watched)[0] == "open"
    assert watched.autotune.events[0].numbers["expected"] == pytest.approx(13.5)


def test_calls_that_overlap_are_not_timed(watched: Any, clock: Clock) -> None:
    watch = watched.autotune._serving.watch
    watch.share = 0.0
    watch._paces.plan[PLAIN] = LatencyCusum(0.01)
    clock.tick = 0.0135
    with watched.autotune._tuning._traffic.request():  # another call is in flight all the time
        serve(watched, 30, tokens=9)
    assert phases(watched) == []
    serve(watched, 9, tokens=9)
    assert phases(watched) == ["open"]


@pytest.mark.parametrize(("original_s", "seen"), [(0.0135, ["open", "closed"]), (0.012, ["open"])])
def test_a_machine_that_became_slower_is_not_the_plans_fault(
    watched: Any, clock: Clock, original_s: float, seen: list[str]
) -> None:
    watch = watched.autotune._serving.watch
    watch._paces.plan[PLAIN] = LatencyCusum(0.01)
    watch.share = 0.0
    watch.rules = Rules(pause_s=1e6)
    clock.tick = 0.0135
    serve(watched, 9, tokens=9)
    clock.tick = original_s
    serve(watched, 3, tokens=9)
    assert phases(watched) == seen


@pytest.mark.parametrize("known", [shape_of(1, IDS.shape[1]), shape_of(1, 40 * IDS.shape[1])])
@pytest.mark.parametrize(("original_s", "seen"), [(0.0136, ["closed"]), (0.0134, ["open"])])
def test_a_plan_that_is_still_faster_than_the_original_was_goes_on(
    watched: Any, clock: Clock, original_s: float, seen: list[str], known: Shape, caplog: pytest.LogCaptureFixture
) -> None:
    """No user gets the slower original for it, and it is told once."""
    watch = watched.autotune._serving.watch
    watch.share = 0.0
    watch._paces.plan[PLAIN] = LatencyCusum(0.01)
    watch._paces.originals_s = {known: original_s, shape_of(1, 90 * IDS.shape[1]): 9.0, shape_of(2, IDS.shape[1]): 9.0}
    clock.tick = 0.0135
    serve(watched, 9, tokens=9)
    assert phases(watched) == seen
    if seen == ["open"]:
        return
    serve(watched, 30, tokens=9)
    assert phases(watched) == seen
    assert watched.autotune.status.state == "tuned"
    assert watched.autotune.status.bypassed == {}
    (event,) = watched.autotune.events
    assert event.numbers == pytest.approx({"ms per token": 13.5, "expected": 10, "original": 13.6})
    assert "tokens take longer than at commit, at batch 1, but less than the original's did" in caplog.text
    clock.tick = 0.0135 * 1.35  # slower than the original was
    serve(watched, 9, tokens=9)
    assert phases(watched) == ["closed", "open"]


@pytest.mark.fault("E67", "E70")
def test_a_plan_that_keeps_failing_rests_longer_and_ends(watched: Any, clock: Clock) -> None:
    from autotune.model.route import bare

    expected = greedy(bare(watched), tokens=2)
    decode = watched.autotune._serving.active.modules["decode"]
    calls: list[float] = []

    def broken(*_: Any, **__: Any) -> None:
        calls.append(clock.now)
        raise RuntimeError("no such kernel")

    decode.forward = broken
    for _ in range(70):
        breaker = watched.autotune._serving.watch.breaker
        if breaker.phase == "closed" or breaker.due(clock.now):
            with pytest.warns(RuntimeWarning, match="no such kernel"):
                assert greedy(watched, tokens=2) == expected
        else:
            assert greedy(watched, tokens=2) == expected  # every call is answered, none twice
        clock.now += 1
    assert calls == [0, 10, 30, 65]
    assert phases(watched) == ["open", "half-open"] * 3 + ["disabled"]
    assert watched.autotune.status.bypassed == {"the plan rests after it failed": 66}
    watched.autotune.commit()
    assert watched.autotune._serving.watch.breaker.phase == "closed"


@pytest.mark.fault("E67")
def test_a_plan_that_failed_once_serves_again(watched: Any, clock: Clock) -> None:
    decode = watched.autotune._serving.active.modules["decode"]
    good = decode.forward
    decode.forward = lambda *_, **__: 1 / 0
    with pytest.warns(RuntimeWarning, match="tried again"):
        greedy(watched)
    decode.forward = good
    assert watched.autotune.status.transforms == ()
    clock.now += 10
    greedy(watched)
    assert phases(watched) == ["open", "half-open", "closed"]
    assert watched.autotune.status.state == "tuned"
    assert watched.autotune.status.served == 1


def test_a_trial_of_a_batch_size_that_fails_otherwise_leaves_the_next_one_to_try() -> None:
    clock = Clock()
    watch, call = Watch(0.0, clock=clock, rules=RULES), Mock(input_ids=torch.zeros(3, 1))
    watch.unready(call, None)
    assert not watch.admits(3)
    clock.now = 10
    assert watch.admits(3)  # the size's trial
    watch.failed("the plan failed", call=call)
    clock.now = 20
    assert watch.admits(1)  # the plan's trial
    watch._step(BreakerEvent.SERVED, "served")
    assert watch.admits(3)


def test_a_failure_of_a_call_is_noted_for_its_batch_size(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = list[Any]()
    watch, decode = watched.autotune._serving.watch, watched.autotune._serving.active.modules["decode"]
    monkeypatch.setattr(watch, "failed", lambda reason, call, variant: noted.append(call.input_ids.shape[0]))
    decode.forward = lambda *_, **__: 1 / 0
    with pytest.warns(RuntimeWarning):
        greedy(watched)
    assert noted == [1]


def test_a_drift_that_cannot_be_looked_into_is_no_reason_to_serve_again(watched: Any, clock: Clock) -> None:
    serve(watched, tokens=4)
    watch = watched.autotune._serving.watch
    watch.failed("made up", Cause.DRIFT)
    obstacle, watch._obstacle = watch._obstacle, lambda: "the original is released"
    for _ in range(RULES.most_flaps + 1):
        clock.now += 10
        watch.work()
    assert phases(watched) == ["open"] + ["half-open", "open"] * (RULES.most_flaps + 1), "it says nothing of the plan"
    assert "could not be compared" in watched.autotune.events[-1].reason
    watch._obstacle = obstacle
    clock.now += 10
    watch.work()
    assert phases(watched)[-1] == "closed"


def test_a_drift_that_is_looked_into_while_the_model_changes_is_looked_into_again(
    watched: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = drifted(watched, clock)
    with monkeypatch.context() as changing:

        def changed(*given: Any) -> Any:
            watched.train()
            return score(*given)

        changing.setattr("autotune.live.watch.watch.score", changed)
        watch.work()
    watched.eval()
    watch.work()
    assert phases(watched) == ["open", "half-open", "open", "half-open", "closed"]


@pytest.mark.parametrize("late", [Cause.FAILURE, Cause.LATENCY, Cause.RECOMPILING])
def test_a_call_from_before_it_opened_does_not_say_why_it_did(watched: Any, clock: Clock, late: Cause) -> None:
    watch = watched.autotune._serving.watch
    watch.failed("made up", Cause.DRIFT)
    watch.failed("a call from before", late)
    clock.now += 10
    assert (watch.cause, watch.admits(1)) == (Cause.DRIFT, False)


@pytest.mark.parametrize(
    "ended",
    [
        lambda watch, call, former: watch.failed("the plan failed", call=call, variant=former),
        lambda watch, call, former: watch.unready(call, former),
        lambda watch, call, former: watch.abandoned(former, call),
    ],
    ids=["failed", "unready", "abandoned"],
)
def test_a_call_of_the_former_plan_says_nothing_about_the_one_that_serves(watched: Any, ended: Any) -> None:
    watch, former, call = watched.autotune._serving.watch, Mock(), Mock(input_ids=torch.zeros(3, 1))
    store.save(found := replace(watched.autotune.plan, created="2026-01-01T00:00:00+00:00"))
    watch.begin(watch._variant, found, lambda: None, stored=True)
    ended(watch, call, former)
    assert (phases(watched), watch.admits(3), watch.admits(1)) == ([], True, True)
    assert store.find(PRINT) is not None


@pytest.mark.parametrize("fails", [True, False])
def test_a_call_that_ends_under_another_plan_is_answered_and_not_judged(watched: Any, fails: bool) -> None:
    expected, handle, former = greedy(watched), watched.autotune, watched.autotune._serving.active
    other = Variant(former.original, former.traffic).with_transforms([LeanLoop()])

    def switch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if handle._serving.active is former:
            handle._serving.begin(other, handle.plan)
            if fails:
                former.modules["decode"].forward = lambda *_, **__: 1 / 0
        return scores

    with pytest.warns(RuntimeWarning, match="the plan failed: .*ZeroDivision") if fails else nullcontext():
        assert greedy(watched, logits_processor=[switch]) == expected
    assert (phases(watched), handle._serving.watch.served) == ([], 0)
    assert greedy(watched) == expected
    assert handle._serving.watch.served == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_gives_up_the_trials_of_its_parent(watched: Any, clock: Clock) -> None:
    watch = watched.autotune._serving.watch
    watch.failed("made up")
    clock.now += 10
    assert watch.admits(1)

    def serves() -> bool:
        greedy(watched)
        return phases(watched) == ["open", "half-open", "half-open", "closed"]

    assert in_child(serves) == ANSWERED
    assert phases(watched) == ["open", "half-open"]


@pytest.mark.fault("E67")
def test_a_trial_that_its_caller_gives_up_leaves_the_next_one_to_try(watched: Any, clock: Clock) -> None:
    watched.autotune._serving.watch.failed("made up")
    clock.now += 10

    def leave(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError("the client has gone")

    with pytest.raises(KeyError):
        greedy(watched, logits_processor=[leave])
    greedy(watched)
    assert phases(watched) == ["open", "half-open", "open", "half-open", "closed"]


def test_a_recompile_storm_takes_the_plan_out(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(10_000))
    monkeypatch.setattr("autotune.live.watch.watch.graphs", lambda: next(count))
    serve(watched, COMPILED_CALLS)
    assert "compile over and over" in watched.autotune.events[0].reason


def test_without_the_original_latency_and_nan_are_watched(watched: Any, clock: Clock) -> None:
    watched.autotune._serving.original.place = "released"
    assert "the original is released" in watched.autotune.status.watch
    spoil(watched)
    serve(watched, 3)
    assert phases(watched) == []
    assert watched.autotune._serving.watch.divergence.samples == 0
    decode = watched.autotune._serving.active.modules["decode"]
    decode.lm_head.weight = torch.nn.Parameter(decode.lm_head.weight * math.nan, requires_grad=False)
    watched.autotune._serving.watch._rest_until_s = 0.0
    serve(watched)
    assert phases(watched) == ["open"]
    watch, good = watched.autotune._serving.watch, torch.nn.Parameter(watched.lm_head.weight, requires_grad=False)
    clock.now += 10
    watch.work()  # they still are
    decode.lm_head.weight = good
    clock.now += 20
    watch.work()
    assert phases(watched) == ["open", "half-open", "open", "half-open", "closed"]
    assert watched.autotune.events[-1].reason == "the kept call is sound again"
    watched.autotune._serving.original.place = "resident"


def test_the_canary_uses_a_twentieth_of_the_time(watched: Any, clock: Clock) -> None:
    watch, clock.tick = watched.autotune._serving.watch, 0.001
    start = clock.now
    serve(watched, 1)
    spent = watch._rest_until_s - clock.now
    assert watch.scored == 1
    assert 0 < spent < 20 * (clock.now - start)
    clock.tick = 0.0
    serve(watched, 2, tokens=2)
    assert watch.scored == 1
    clock.now += spent
    serve(watched, 1, tokens=2)
    assert watch.scored == 2


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (0.25, 25), (1.0, 100)])
def test_only_a_share_of_the_calls_is_kept(watched: Any, share: float, kept: int) -> None:
    watch, draws, seen = watched.autotune._serving.watch, iter(k / 100 for k in range(100)), []
    watch.share = share
    watch.chance = lambda: next(draws)
    watch._keep = lambda call, result: seen.append(result)
    for _ in range(100):
        greedy(watched, tokens=1)
    assert len(seen) == kept


def test_what_is_kept_is_bounded(watched: Any) -> None:
    for _ in range(5):
        greedy(watched, tokens=40)
    (sample,) = watched.autotune._serving.watch._samples
    assert len(sample.answer) == 16
    assert list(sample.prompt) == IDS[0].tolist()


def test_scoring_calls_no_hook_that_is_set_meanwhile(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called, scored = list[str](), list[Any]()

    def hooked(*given: Any) -> Any:
        for part in (watched, watched.model.layers[0], watched.lm_head):
            part.register_forward_hook(lambda module, args, out: called.append(type(module).__name__))
        scored.append(found := score(*given))
        return found

    monkeypatch.setattr("autotune.live.watch.watch.score", hooked)
    serve(watched, 1, tokens=4)
    ((kld, defect),) = scored
    assert (called, defect) == ([], None)
    assert kld < 1e-6
    assert watched.autotune._serving.watch.scored == 0, "what computes something else meanwhile is no evidence"


def test_scoring_leaves_no_mark_on_the_answers(watched: Any) -> None:
    from autotune.model.route import bare

    before = greedy(bare(watched), tokens=12)
    serve(watched, 2)
    assert greedy(watched, tokens=12) == before


def test_a_background_thread_scores_when_idle(monkeypatch: pytest.MonkeyPatch, watched: Any) -> None:
    monkeypatch.undo()
    watch = watched.autotune._serving.watch
    greedy(watched, tokens=12)
    assert watch._worker is not None
    watch._worker.join(60)
    assert watch.scored == 1


def test_a_call_is_served_where_no_thread_can_score_it(monkeypatch: pytest.MonkeyPatch, watched: Any) -> None:
    monkeypatch.undo()
    watch = watched.autotune._serving.watch
    with monkeypatch.context() as full:
        without_threads(full)
        greedy(watched, tokens=12)
        watch.failed("made up", Cause.DRIFT)
        watch.breaker = replace(watch.breaker, pause_s=0.0)
        greedy(watched, tokens=12)  # which asks for the kept call to be scored again
    assert (watch.served, phases(watched)) == (1, ["open"])
    greedy(watched, tokens=12)
    watch._worker.join(60)
    assert phases(watched) == ["open", "half-open", "closed"]


def test_a_kept_call_that_cannot_be_scored_is_scored_again_after_a_pause(
    watched: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = drifted(watched, clock)
    with monkeypatch.context() as lacking:
        lacking.setattr("autotune.live.watch.watch.score", Mock(side_effect=MemoryError))
        for _ in range(3):
            watch._work_quietly()
    assert phases(watched) == ["open", "half-open", "open"], "the pause has not passed"
    clock.now += 10
    watch.work()
    assert phases(watched)[3:] == ["half-open", "closed"]


def test_what_failed_is_not_adopted_blindly_by_the_next_process(watched: Any) -> None:
    found = replace(watched.autotune.plan, fingerprint=PRINT, created="2026-01-01T00:00:00+00:00")
    store.save(found)
    assert store.find(PRINT) is not None
    watch = watched.autotune._serving.watch
    watch.begin(watch._variant, found, lambda: None, stored=True)
    watch.failed("made up")
    assert store.find(PRINT) is None
    watch._step("asked", "")  # too early
    watch.clock.now += 10
    assert watch.admits(1)
    watch._step("served", "fine again")
    assert store.find(PRINT) is not None
    watch.failed("made up")
    store.save(found)  # a search proved it anew
    assert store.find(PRINT) is not None


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ValueError, match="watch"):
        autotune.wrap(tiny("llama"), watch=share)
