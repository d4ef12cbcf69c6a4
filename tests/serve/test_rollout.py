"""What is seen of a canary, and what follows from it: no process, no clock, no model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autotune.compare.experiment.guardrails import stated_bound
from autotune.serve.answering import Answered
from autotune.serve.rollout.decision import CanaryRules, Duty, Rollout, RolloutState, Seen, Sight, duty, judged, verdict
from autotune.serve.rollout.record import status
from autotune.serve.rollout.tally import AnswerTally
from autotune.validate import Verdict

RULES = CanaryRules()
BEGUN = Rollout("plan", "canary", began_s=0.0, serves=True)
ANSWERS = 1500
CANARY, PROMOTED, ROLLED_BACK = RolloutState


def figures(answers: int = ANSWERS, ttft: float = 1.0, tpot: float = 1.0, errors: float = 0.0, seed: int = 0) -> Any:
    """Statistics of random answers: times as multiples of 100 ms and 10 ms, with a spread of 20 %."""
    rng, tally = np.random.default_rng(seed), AnswerTally(RULES, clock=lambda: 0.0)
    tally.begin()
    for _ in range(answers):
        first, pace = np.exp(rng.normal(0, 0.2, 2))
        outcome = "error" if rng.random() < errors else "length"
        tally.hear(Answered(1.0, outcome, 0.1 * ttft * first, 0.01 * tpot * pace))
    return tally.figures


OTHERS = figures(seed=1)


@pytest.mark.parametrize(
    ("seen", "state", "reason"),
    [
        ({}, PROMOTED, "within every limit"),
        ({"tpot": 0.5}, PROMOTED, "within every limit"),
        ({"tpot": 1.3}, ROLLED_BACK, "over the limit: tpot +3"),
        ({"ttft": 1.4}, ROLLED_BACK, "over the limit: ttft +4"),
        ({"errors": 0.1}, ROLLED_BACK, "over the limit: failures"),
        ({"tpot": 1.1}, CANARY, "open: tpot"),  # at the limit
        ({"answers": 19}, CANARY, "19 of at least 50 requests"),
        ({"answers": 0}, CANARY, "0 of at least 50 requests"),
    ],
    ids=str,
)
def test_a_canary_is_judged_by_what_its_answers_took(seen: dict[str, Any], state: RolloutState, reason: str) -> None:
    after = judged(BEGUN, Seen(60.0, OTHERS, figures(**seen)), RULES)
    assert after.state is state
    assert reason in after.reason


@pytest.mark.parametrize(
    ("seen", "state", "reason"),
    [
        (Seen(60.0, is_alive=False), ROLLED_BACK, "the canary's process ended"),
        (Seen(60.0, failure="NaN logits"), ROLLED_BACK, "the plan failed on the canary: NaN logits"),
        (Seen(60.0), CANARY, "0 of at least 50"),
        (Seen(60.0, {}, figures(100)), CANARY, "open"),  # there are no others to compare with
        (Seen(RULES.patience_s + 1, OTHERS, figures(30)), ROLLED_BACK, "not proven within 24 h"),
        (Seen(60.0, OTHERS, figures(), failure="drift"), ROLLED_BACK, "drift"),  # however fast it is
    ],
    ids=str,
)
def test_a_canary_that_dies_or_fails_or_proves_nothing_is_rolled_back(
    seen: Seen, state: RolloutState, reason: str
) -> None:
    after = judged(BEGUN, seen, RULES)
    assert after.state is state
    assert reason in after.reason


def test_limits_are_the_operators() -> None:
    slow = Seen(60.0, OTHERS, figures(tpot=1.3))
    assert judged(BEGUN, slow, replace(RULES, slower=0.5)).state is PROMOTED
    assert judged(BEGUN, slow, replace(RULES, slower=0.5, requests=ANSWERS + 1)).state is CANARY


@pytest.mark.parametrize("state", [PROMOTED, ROLLED_BACK])
def test_what_is_over_stays_as_it_is(state: RolloutState) -> None:
    over = BEGUN.ended(state, "why")
    assert judged(over, Seen(60.0, is_alive=False), RULES) is over


def test_a_canary_that_is_like_the_others_is_rarely_rolled_back() -> None:
    outcomes = []
    for seed in range(60):
        rollout = BEGUN
        for answers in (30, 60, 120, 240, 480, 960):  # many looks at one stream
            others, canary = figures(answers, seed=2 * seed), figures(answers, seed=2 * seed + 1)
            rollout = judged(rollout, Seen(60.0, others, canary), RULES)
        outcomes.append(rollout.state)
    assert outcomes.count(ROLLED_BACK) <= 3  # 5 % of 60
    assert outcomes.count(PROMOTED) >= 50


def test_only_answers_that_began_with_the_rollout_count() -> None:
    now = 10.0
    tally = AnswerTally(RULES, clock=lambda: now)
    tally.hear(Answered(11.0, "stop", 0.1, 0.01))  # nothing has begun
    tally.begin()
    tally.hear(Answered(9.0, "stop", 0.1, 0.01))  # with what served before
    for outcome in ("stop", "length", "error", "deadline", "abort", "rejected"):
        tally.hear(Answered(11.0, outcome))
    assert (tally.figures["failures"].n, tally.figures["failures"].hits) == (4, 2)
    assert "ttft" not in tally.figures
    tally.end()
    tally.hear(Answered(12.0, "stop"))
    assert tally.figures["failures"].n == 4


MINE, OTHER = replace(BEGUN, canary="me"), BEGUN
KNOWS = Sight("me", is_settled=True)
DONE, UNDONE = OTHER.ended(PROMOTED, ""), OTHER.ended(ROLLED_BACK, "")


@pytest.mark.parametrize(
    ("sight", "expected"),
    [
        (KNOWS, Duty.NOTHING),
        (replace(KNOWS, offered="plan"), Duty.TRY),
        (replace(KNOWS, offered="plan", is_settled=False), Duty.NOTHING),
        (replace(KNOWS, offered="plan", rollout=MINE), Duty.JUDGE),
        (replace(KNOWS, offered="another", rollout=MINE), Duty.JUDGE),  # one after the other
        (replace(KNOWS, offered="plan", rollout=OTHER), Duty.COMPARE),
        (replace(KNOWS, offered="plan", rollout=OTHER, is_settled=False), Duty.COMPARE),  # it may bury the dead
        (replace(KNOWS, offered="plan", rollout=UNDONE), Duty.NOTHING),
        (replace(KNOWS, offered="another", rollout=UNDONE), Duty.TRY),
        (replace(KNOWS, offered="plan", rollout=UNDONE, promoted="earlier"), Duty.FOLLOW),
        (replace(KNOWS, offered="plan", rollout=DONE, promoted="plan"), Duty.FOLLOW),
        (replace(KNOWS, offered="plan", rollout=DONE, promoted="plan", serves="plan"), Duty.NOTHING),
        (replace(KNOWS, promoted="plan", refused=frozenset({"plan"})), Duty.NOTHING),
    ],
    ids=str,
)
def test_a_replica_knows_what_is_next(sight: Sight, expected: Duty) -> None:
    assert duty(sight) is expected


@pytest.mark.parametrize(
    ("state", "found", "said"),
    [
        (CANARY, Verdict.INCONCLUSIVE, "running"),
        (PROMOTED, Verdict.PASS, "full"),
        (ROLLED_BACK, Verdict.FAIL, "rolled back"),
    ],
)
def test_a_rollout_is_shown_as_an_experiment(state: RolloutState, found: Verdict, said: str) -> None:
    rollout = replace(BEGUN.ended(state, "why"), control=OTHERS, candidate=figures(500))
    assert verdict(rollout) is found
    lines = status(rollout, RULES, "closed; 5 of 500 calls scored again").lines()
    assert lines[0] == f"rollout: canary, {said}, 2000 requests (canary 500, other replicas 1500)"
    assert lines[1] == f"plan (plan): {found.value}; why"
    assert any(line.startswith("  quality: closed") for line in lines)
    assert any(line.startswith("  tpot: +20% is caught within") for line in lines)


@pytest.mark.parametrize(
    ("canary", "others", "share"),
    [(0, 0, 0.0), (0, 100, 0.0), (100, 0, 1.0), (100, 100, 0.5), (100, 300, 0.25)],
)
def test_a_rollout_states_the_share_that_the_canary_really_has(canary: int, others: int, share: float) -> None:
    rollout = judged(BEGUN, Seen(60.0, figures(others, seed=1), figures(canary)), RULES)
    found = status(rollout, RULES).candidates[0]
    assert found.reason.startswith(f"{canary} of at least 50 requests; open: ")
    assert found.share == share
    expected = [stated_bound(RULES.rails[0], RULES.ramp().alpha, share=share)] if share else []
    assert list(found.bounds[:1]) == expected
