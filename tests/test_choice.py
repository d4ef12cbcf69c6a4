"""What `make bench-choice` concludes from its two searches."""

from __future__ import annotations

import pytest

from autotune.transforms import make
from autotune.tune.plan import Trial, TrialOutcome
from autotune.validate import Latency, Speedup, Verdict
from autotune.workload import Target
from benchmarks import choice

THREADS = make("threads", {"count": 1}, "decode")


def gain(ratio: float, width: float = 0.01) -> Speedup:
    return Speedup(ratio, ratio - width, ratio + width, 25)


def trial(predicted: float | None, target: Target, *, prefill: float, decode: float, both: float) -> Trial:
    timed = Latency(Verdict.PASS, "scripted", gain(prefill), gain(decode), gain(both), 0.0)
    return Trial(THREADS, "a step", target, TrialOutcome.ACCEPTED, "", predicted=predicted, latency=timed)


@pytest.mark.parametrize(
    ("predicted", "target", "near"),
    [
        (2.0, "decode", True),
        (2.5, "decode", True),
        (1.5, "decode", True),
        (2.51, "decode", False),
        (1.49, "decode", False),
        (4.0, "prefill", True),
        (2.0, "prefill", False),
        (3.0, "both", True),
        (2.0, "both", False),
    ],
)
def test_a_prediction_is_right_within_a_quarter_of_what_its_phase_measured(
    predicted: float, target: Target, near: bool
) -> None:
    tried = trial(predicted, target, prefill=4.0, decode=2.0, both=3.0)
    assert choice.audit([tried]) == {"timed": 1, "near": int(near)}


def test_what_was_not_timed_or_promised_nothing_is_not_counted() -> None:
    ruled_out = Trial(THREADS, "a step", "decode", TrialOutcome.SKIPPED, "", predicted=2.0)
    draft = trial(None, "both", prefill=2.0, decode=2.0, both=2.0)
    assert choice.audit([ruled_out, draft]) == {"timed": 0, "near": 0}


@pytest.mark.parametrize(
    ("race", "share", "code"),
    [
        (None, 0.5, 0),
        (None, 0.51, 1),
        (gain(1.02), 0.3, 0),
        (gain(1.02), 0.6, 1),
        (gain(1.05), 0.3, 1),
        (gain(1.05, 0.03), 0.3, 2),
        (gain(1.05, 0.03), 0.6, 1),
        (gain(0.9), 0.3, 0),
    ],
)
def test_the_choice_is_good_within_3_percent_at_half_the_time(race: Speedup | None, share: float, code: int) -> None:
    found, sentence = choice.verdict(race, share)
    assert found == code
    assert f"{share:.0%} of the time" in sentence
