"""Which step of a policy comes next. Its transforms' names say what they are: of weights, lossless, compiling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from autotune import transforms
from autotune.runtime.variant import Stage, Transform
from autotune.tune.order import CalledStep, Pace, first_of, slow_prefill_of
from autotune.tune.plan import Trial, TrialOutcome
from autotune.tune.policy import Choice, PolicyStep
from autotune.validate import Latency, Quality, Speedup, Verdict


@dataclass(frozen=True)
class Weights(Transform):
    name: ClassVar[str] = "weights"
    stage: ClassVar[Stage] = Stage.WEIGHTS


@dataclass(frozen=True)
class Attention(Weights):
    name: ClassVar[str] = "attention"
    stage: ClassVar[Stage] = Stage.ATTENTION
    lossless: ClassVar[bool] = True


@dataclass(frozen=True)
class Compile(Attention):
    name: ClassVar[str] = "compile"
    stage: ClassVar[Stage] = Stage.COMPILE


@dataclass(frozen=True)
class Guess(Attention):
    name: ClassVar[str] = "guess"
    stage: ClassVar[Stage] = Stage.SPECULATION


MADE = {kind.name: kind for kind in (Weights, Attention, Compile, Guess)}


class Costs:
    operator_count = 1400  # 70 s to compile


def offer(name: str, promised: float, share: float = 1.0, failures: int = 0) -> CalledStep:
    step = PolicyStep(name, "decode", (Choice(name, {}, "decode"),))
    made = MADE[name](phase="decode")
    return CalledStep(
        step, [Trial(made, name, "decode", TrialOutcome.SKIPPED, "", predicted=promised)], share, failures
    )


@pytest.mark.parametrize(
    ("offers", "making_s", "expected"),
    [
        # half of what narrower numbers promise is expected, nine tenths of what is lossless
        ([offer("weights", 1.5), offer("attention", 1.5)], 0.0, "attention"),
        ([offer("weights", 2.5), offer("attention", 1.5)], 0.0, "weights"),
        # a share of the request
        ([offer("weights", 2.5, share=0.1), offer("attention", 1.5, share=0.9)], 0.0, "attention"),
        # compiling takes 70 s beside the 20 of a trial, and once more after what else promises something
        ([offer("compile", 2.0), offer("attention", 1.2)], 0.0, "attention"),
        ([offer("compile", 2.0), offer("attention", 1.01)], 0.0, "compile"),
        ([offer("compile", 8.0), offer("attention", 1.2)], 0.0, "compile"),
        # the longer the current variant takes to be made anew, the less that matters
        ([offer("compile", 2.0), offer("attention", 1.2)], 300.0, "compile"),
        # a choice of the step gained no time
        ([offer("attention", 1.3, failures=1), offer("weights", 1.4)], 0.0, "weights"),
        ([offer("attention", 1.3), offer("weights", 1.4)], 0.0, "attention"),
        # guessing promises as if every guess were right
        ([offer("guess", 8.0), offer("attention", 1.1)], 0.0, "attention"),
    ],
)
def test_what_gains_most_for_its_time_comes_first(
    offers: list[CalledStep], making_s: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "make", lambda name, params, phase: MADE[name](phase=phase))
    costs: Any = {"decode": Costs()}
    for given in (offers, offers[::-1]):
        assert first_of(given, Pace("cuda", 20.0, making_s, costs), min_gain=0.03).name == expected


def test_a_cpu_counts_foreign_code_as_three_trials_and_making_as_none() -> None:
    trials = {name: offer(name, 2.0).trials[0] for name in ("compile", "attention")}
    pace = Pace("cpu", 20.0, 300.0, {})
    assert {name: pace.seconds(trial) for name, trial in trials.items()} == {"compile": 60.0, "attention": 60.0}


GAIN = Speedup(0.98, 0.97, 0.99, 25)
SLOW, FAST = (Latency(verdict, "", GAIN, GAIN, GAIN, 0.01) for verdict in (Verdict.FAIL, Verdict.PASS))
GOOD, BAD = (Quality("strict", verdict, "") for verdict in (Verdict.PASS, Verdict.FAIL))
TRIAL = Trial(Weights("prefill"), "w", "prefill", TrialOutcome.REJECTED, "", quality=GOOD, latency=SLOW)


@pytest.mark.parametrize(
    ("changes", "slow"),
    [
        ({}, True),
        ({"quality": BAD, "latency": None}, False),
        ({"latency": FAST}, False),
        ({"target": "decode"}, False),
        ({"others": (Compile("prefill"),)}, False),
        ({"transform": Attention("prefill")}, False),
    ],
)
def test_weights_that_are_only_too_slow_alone(changes: dict[str, Any], slow: bool) -> None:
    trial = replace(TRIAL, **changes)
    assert slow_prefill_of(trial) == (trial.transform if slow else None)
