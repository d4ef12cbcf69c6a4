"""Ramps: stable keys, guarded steps, and when a candidate is rolled back; on scripted figures."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from autotune.compare.experiment import Guardrail, ramp
from autotune.compare.experiment.guardrails import STANDARD
from autotune.compare.experiment.ramp import Ramp, RampProgress, RampState
from autotune.compare.experiment.sequential import Moments, requests_to_see_rate
from autotune.errors import ExperimentError
from autotune.validate import Verdict

if TYPE_CHECKING:
    pass

SHARES = (0.01, 0.1, 0.5, 1.0)
ERRORS = STANDARD[0]


@pytest.mark.parametrize("salt", ["one", "two"])
@pytest.mark.parametrize("share", SHARES)
def test_keys_go_to_the_candidate_in_proportion(salt: str, share: float) -> None:
    places = [ramp.place(salt, f"user-{n}") for n in range(20_000)]
    assert np.mean([p < share for p in places]) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 2e4))


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.1), (0.1, 0.5), (0.5, 1.0)])
def test_raising_the_share_only_moves_keys_to_the_candidate(low: float, high: float) -> None:
    places = [ramp.place("salt", f"user-{n}") for n in range(2000)]
    before, after = ({n for n, p in enumerate(places) if p < share} for share in (low, high))
    assert before < after


@pytest.mark.parametrize(
    ("salt", "key", "expected"),
    [("trial", "user-42", 0.578), ("trial", b"user-42", 0.578), ("other", "user-42", 0.178)],
)
def test_a_key_has_its_place_for_good(salt: str, key: str | bytes, expected: float) -> None:
    assert ramp.place(salt, key) == pytest.approx(expected, abs=0.0005)


def test_salts_are_independent() -> None:
    both = [(ramp.place("a", str(n)) < 0.5, ramp.place("b", str(n)) < 0.5) for n in range(10_000)]
    assert np.mean([a and b for a, b in both]) == pytest.approx(0.25, abs=0.02)


def drawn(errors: float = 0.0, slower: float = 0.0) -> Any:
    """Values of one answer: failures at a rate, log times with a spread of 30 %."""

    def draw(rng: np.random.Generator) -> dict[str, float]:
        failed = float(rng.random() < errors)
        return {"errors": failed, "ttft": rng.normal(slower, 0.3), "tpot": rng.normal(slower, 0.3)}

    return draw


def climb(rules: Ramp, candidate: Any, seed: int, requests: int) -> list[RampProgress]:
    """Every state on the way, request by request, with everybody else's requests to the control."""
    rng, progress, seen = np.random.default_rng(seed), RampProgress(), list[RampProgress]()
    control = drawn()
    for _ in range(requests):
        share = rules.share(progress)
        others = 0 if share >= 1 else min(20, round((1 - share) / share))
        for _ in range(others):
            progress = ramp.observed(progress, "control", control(rng))
        progress = rules.advance(ramp.observed(progress, "candidate", candidate(rng)))
        seen.append(progress)
        if progress.state == "rolled back":
            break
    return seen


def test_a_candidate_as_good_climbs_to_the_top() -> None:
    seen = climb(Ramp(SHARES, STANDARD), drawn(), seed=0, requests=8000)
    assert [seen[n].step for n in (0, -1)] == [0, 3]
    assert seen[-1].state == "full"
    for before, after in pairwise(seen):
        assert after.step in (before.step, before.step + 1)
        if after.step > before.step:  # and not before it was shown
            assert before.requests + 1 >= 50


BAD: dict[str, tuple[Any, str]] = {
    "always fails": (drawn(errors=1.0), "errors"),
    "fails at times": (drawn(errors=0.12), "errors"),
    "slower": (drawn(slower=math.log(1.2)), "t"),
    "much slower": (drawn(slower=math.log(2.0)), "t"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_worse_candidate_is_rolled_back(name: str) -> None:
    candidate, why = BAD[name]
    seen = climb(Ramp((0.5, 1.0), STANDARD), candidate, seed=1, requests=5000)
    assert seen[-1].state == "rolled back"
    assert seen[-1].step == 0
    assert seen[-1].reason.startswith(f"over the limit: {why}")


def test_it_is_rolled_back_within_the_stated_number_of_requests() -> None:
    rules = Ramp((0.5, 1.0), (ERRORS,))
    stated = requests_to_see_rate(0.12, ERRORS.limit, rules.alpha)
    assert f"a rate of 12% is caught within {stated} requests" in rules.bounds(RampProgress())[0]
    took = [len(climb(rules, drawn(errors=0.12), seed, requests=2000)) for seed in range(40)]
    assert sum(n > stated for n in took) <= 5  # at most 5 %, and the simulation's own error
    assert len(climb(rules, drawn(errors=1.0), 0, 100)) == requests_to_see_rate(1.0, ERRORS.limit, rules.alpha)


def test_it_is_rolled_back_within_the_stated_number_of_all_requests() -> None:
    """The control's figures are those of the step before, and do not grow."""
    rules = Ramp((0.5, 1.0), (Guardrail("ttft", "ratio", 0.1),))
    rng = np.random.default_rng(6)
    took = []
    for _ in range(40):
        before = Moments()
        for value in rng.normal(0.0, 0.2, 600):
            before = before.add(float(value))
        progress = begun = RampProgress(step=1, control={"ttft": before})
        while progress.state != "rolled back" and progress.requests < 5000:
            progress = rules.advance(
                ramp.observed(progress, "candidate", {"ttft": float(rng.normal(math.log(1.2), 0.2))})
            )
        took.append(progress.requests)
    stated = int(re.findall(r"within (\d+) requests", rules.bounds(begun)[0])[0])
    assert sum(n > stated for n in took) <= 5  # at most 5 %, and the simulation's own error


def test_a_candidate_within_the_limits_is_hardly_ever_rolled_back() -> None:
    rules = Ramp((0.5, 1.0), (ERRORS,))
    fallen = sum(climb(rules, drawn(errors=0.01), seed, 200)[-1].state == "rolled back" for seed in range(40))
    assert fallen <= 40 * ramp.ALPHA


def test_backing_off() -> None:
    rules = Ramp(SHARES, (ERRORS,), step_requests=10)
    fallen = replace(RampProgress(), state=RampState.ROLLED_BACK, rollbacks=2, step=3, requests=9)
    assert rules.share(fallen) == 0.0
    assert rules.advance(fallen) is fallen
    again = ramp.resumed(fallen)
    assert (rules.share(again), rules.needed(again), again.requests) == (0.01, 40, 0)
    assert rules.verdict(fallen)[0] is Verdict.FAIL
    assert rules.verdict(again)[0] is Verdict.INCONCLUSIVE
    assert rules.verdict(replace(again, state=RampState.FULL))[0] is Verdict.PASS


@pytest.mark.parametrize("shares", [(), (0.5, 0.1), (0.0, 1.0), (0.5, 1.5), (0.5, 0.5)])
def test_shares_that_do_not_rise_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ExperimentError, match="expected shares that rise"):
        Ramp(shares, (ERRORS,))
