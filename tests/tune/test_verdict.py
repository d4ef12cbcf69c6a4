"""What a search came to, decided on scripted trials: the sentence, whether it is kept, whether anything was tried."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from autotune.runtime.variant import Stage, Transform
from autotune.tune import verdict
from autotune.tune.plan import Trial, TrialOutcome
from autotune.tune.verdict import Conclusion
from autotune.validate import Latency, Quality, Speedup, Verdict


@dataclass(frozen=True)
class Named(Transform):
    """A transform that is only talked about."""

    label: str = "a"
    stage: ClassVar[Stage] = Stage.WEIGHTS

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label

    def __str__(self) -> str:
        return f"{self.label}@{self.phase}"


def trial(outcome: str, reason: str = "because", label: str = "a", raced: Latency | None = None) -> Trial:
    return Trial(Named(label=label), "step", "decode", TrialOutcome(outcome), reason, latency=raced)


def quality(verdict: str) -> Quality:
    return Quality("strict", Verdict(verdict), "KLD says so")


def latency(verdict: str, drowned: bool = False) -> Latency:
    gain = Speedup(1.5, 1.4, 1.6, 8)
    return Latency(Verdict(verdict), "the clock says so", gain, gain, gain, 0.01, drowned=drowned)


WINNER = (Named(label="w"),)
ACCEPTED = trial("accepted", label="w")
NO_KEYS = "the model's forward does not take past_key_values"
SPENT = "the budget of 100 s was spent"
GAIN = (
    "committed w@both: requests 1.50x as fast (95 % interval 1.40 to 1.60), "
    "decode 1.50x (1.40 to 1.60), prefill 1.50x (1.40 to 1.60)"
)

# name -> trials, verdict, doubt, whether nothing could be tried
SEARCHES: dict[str, tuple[list[Trial], str, str | None, bool]] = {
    "nothing considered": (
        [],
        "kept the original: no candidate is both called for and available on this model and machine",
        None,
        False,
    ),
    "nothing wanted": (
        [trial("skipped"), trial("unavailable")],
        "kept the original: no candidate is both called for and available on this model and machine",
        None,
        False,
    ),
    "one judged": (
        [trial("rejected"), trial("skipped")],
        "kept the original: the one candidate tried did not prove both faster and no worse",
        None,
        False,
    ),
    "all judged": (
        [trial("rejected"), trial("rejected"), trial("unavailable")],
        "kept the original: none of 2 candidates tried proved both faster and no worse",
        None,
        False,
    ),
    "noise": (
        [trial("rejected"), trial("inconclusive")],
        "kept the original: none of 2 candidates tried proved both faster and no worse (1 inconclusive)",
        "1 of 2 candidates came out inconclusive",
        False,
    ),
    "nothing could be tried": (
        [
            trial("blocked", "it leaves 16 of 16 prompts to the original: argument cache", "w8"),
            trial("blocked", NO_KEYS, "loop"),
            trial("skipped"),
            trial("blocked", NO_KEYS, "slots"),
        ],
        f"kept the original, but 3 of 3 candidates could not be tried: {NO_KEYS} (loop, slots); "
        "it leaves 16 of 16 prompts to the original: argument cache (w8)",
        "3 of 3 candidates could not be tried",
        True,
    ),
    "one raised": (
        [trial("error", "ValueError: oops", "b"), trial("rejected"), trial("inconclusive")],
        "kept the original, but 1 of 3 candidates could not be tried: ValueError: oops (b); "
        "none of 2 candidates tried proved both faster and no worse (1 inconclusive)",
        "1 of 3 candidates could not be tried; 1 of 3 candidates came out inconclusive",
        False,
    ),
    "the budget was spent": (
        [trial("rejected"), trial("unreached", SPENT, "b"), trial("unreached", SPENT, "c")],
        f"kept the original, but 2 of 3 candidates could not be tried: {SPENT} (b, c); "
        "the one candidate tried did not prove both faster and no worse",
        "2 of 3 candidates could not be tried",
        False,
    ),
    "the budget was spent at once": (
        [trial("unreached", SPENT, "b")],
        f"kept the original, but 1 of 1 candidates could not be tried: {SPENT} (b)",
        "1 of 1 candidates could not be tried",
        True,
    ),
}
# name -> how the winner's confirmation ended, what the verdict says of it, doubt
CONFIRMATIONS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "committed": ({"quality": quality("pass"), "latency": latency("pass")}, GAIN, None),
    "failed": (
        {"failure": "the largest request failed: out of memory"},
        "kept the original: with w@both the largest request failed: out of memory",
        "the winner failed before it was confirmed",
    ),
    "unknown": ({}, "kept the original: w@both could not be confirmed", "the winner failed before it was confirmed"),
    "worse": (
        {"quality": quality("fail")},
        "kept the original: on held-out prompts w@both did not keep the quality: KLD says so",
        None,
    ),
    "quality unsure": (
        {"quality": quality("inconclusive")},
        "kept the original: the quality of w@both could not be confirmed on held-out prompts: KLD says so",
        "the winner's quality is open",
    ),
    "quality raised": (
        {"quality": quality("error")},
        "kept the original: the quality of w@both could not be confirmed on held-out prompts: KLD says so",
        "the winner's quality is open",
    ),
    "slower": (
        {"quality": quality("pass"), "latency": latency("fail")},
        "kept the original: on held-out prompts w@both did not confirm its speed: the clock says so",
        None,
    ),
    "hidden by noise": (
        {"quality": quality("pass"), "latency": latency("fail", drowned=True)},
        "kept the original: on held-out prompts w@both did not confirm its speed: the clock says so",
        "the winner's speed is open",
    ),
    "speed unsure": (
        {"quality": quality("pass"), "latency": latency("inconclusive")},
        "kept the original: on held-out prompts w@both did not confirm its speed: the clock says so",
        "the winner's speed is open",
    ),
}


@pytest.mark.parametrize(("trials", "said", "doubt", "fruitless"), SEARCHES.values(), ids=SEARCHES.keys())
def test_a_search_without_a_winner(trials: list[Trial], said: str, doubt: str | None, fruitless: bool) -> None:
    found = Conclusion(tuple(trials))
    assert (found.verdict, found.doubt, found.is_committed) == (said, doubt, False)
    assert verdict.is_fruitless(trials) is fruitless


@pytest.mark.parametrize(("ending", "said", "doubt"), CONFIRMATIONS.values(), ids=CONFIRMATIONS.keys())
def test_a_search_with_a_winner(ending: dict[str, Any], said: str, doubt: str | None) -> None:
    found = Conclusion((ACCEPTED, trial("rejected"), trial("skipped")), WINNER, **ending)
    assert (found.verdict, found.doubt, found.is_committed) == (said, doubt, said == GAIN)


def test_a_phase_that_was_not_timed_is_not_told() -> None:
    """As decode of one new token."""
    raced = replace(latency("pass"), tpot=Speedup(math.nan, math.nan, math.nan, 0))
    found = Conclusion((ACCEPTED,), WINNER, None, quality("pass"), raced)
    assert found.verdict == GAIN.replace("decode 1.50x (1.40 to 1.60), ", "")


def test_beside_a_winner_what_failed_is_a_footnote_and_a_spent_budget_is_none() -> None:
    trials = (ACCEPTED, trial("error", label="b"), trial("blocked", label="c"), trial("unreached", label="d"))
    found = Conclusion(trials, WINNER, None, quality("pass"), latency("pass"))
    assert found.verdict == f"{GAIN}; 2 of 4 candidates could not be tried (b, c)"
    assert found.doubt is None
    spent = Conclusion((ACCEPTED, trial("unreached", label="d")), WINNER, None, quality("pass"), latency("pass"))
    assert spent.verdict == GAIN


def test_beside_a_winner_that_was_not_confirmed_what_could_not_be_tried_comes_first() -> None:
    found = Conclusion((ACCEPTED, trial("error", "oops", "b")), WINNER, None, quality("fail"))
    assert found.verdict == (
        "kept the original, but 1 of 2 candidates could not be tried: oops (b); "
        "on held-out prompts w@both did not keep the quality: KLD says so"
    )
    assert found.doubt == "1 of 2 candidates could not be tried"


SLOWER = trial("rejected", raced=latency("fail"))
WORSE = trial("rejected")
DROWNED = trial("inconclusive", raced=latency("fail", drowned=True))
TOO_LITTLE_TEXT = trial("inconclusive")
BESIDE = "1 of 1 candidates came out no faster while others took 23 % of the CPU time"

# what was tried and how it ended, share that others took -> doubt for that, whether a quieter time may show more
BUSY: dict[str, tuple[tuple[Trial, ...], dict[str, Any], float | None, str | None, bool]] = {
    "slower, alone": ((SLOWER,), {}, 0.01, None, False),
    "slower, nobody knows": ((SLOWER,), {}, None, None, False),
    "slower, beside others": ((SLOWER,), {}, 0.23, BESIDE, True),
    "worse, beside others": ((WORSE,), {}, 0.23, None, False),
    "drowned in noise, alone": ((DROWNED,), {}, 0.0, "1 of 1 candidates came out inconclusive", True),
    "too little text": ((TOO_LITTLE_TEXT,), {}, 0.0, "1 of 1 candidates came out inconclusive", False),
    "a crash beside others": ((trial("error"),), {}, 0.23, "1 of 1 candidates could not be tried", False),
    "a winner whose speed is open": (
        (ACCEPTED,),
        {"winner": WINNER, "quality": quality("pass"), "latency": latency("inconclusive")},
        0.0,
        "the winner's speed is open",
        True,
    ),
    "a winner whose quality is open": (
        (ACCEPTED,),
        {"winner": WINNER, "quality": quality("inconclusive")},
        0.0,
        "the winner's quality is open",
        False,
    ),
    "committed beside others": (
        (SLOWER, ACCEPTED),
        {"winner": WINNER, "quality": quality("pass"), "latency": latency("pass")},
        0.23,
        None,
        False,
    ),
}


@pytest.mark.parametrize(("trials", "ending", "elsewhere", "doubt", "noisy"), BUSY.values(), ids=BUSY)
def test_what_noise_or_a_busy_machine_hid_is_not_shown_to_be_no_better(
    trials: tuple[Trial, ...], ending: dict[str, Any], elsewhere: float | None, doubt: str | None, noisy: bool
) -> None:
    found = Conclusion(trials, **ending, elsewhere=elsewhere)
    assert (found.doubt, found.is_noisy) == (doubt, noisy)


@pytest.mark.parametrize("outcome", list(TrialOutcome))
def test_every_outcome_is_judged_untried_or_unwanted(outcome: TrialOutcome) -> None:
    """What is not judged on its figures never counts as shown to be no better."""
    alone = (trial(outcome, "why"),)
    kept = outcome in {TrialOutcome.ACCEPTED, TrialOutcome.REJECTED, TrialOutcome.SKIPPED, TrialOutcome.UNAVAILABLE}
    assert (Conclusion(alone).doubt is None) == kept
    assert verdict.is_fruitless(alone) == (
        outcome in {TrialOutcome.ERROR, TrialOutcome.BLOCKED, TrialOutcome.UNREACHED}
    )
    assert verdict.UNTRIED.isdisjoint(verdict.UNWANTED)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("a@both: it refuses.", "it refuses"),
        ("b@both: it refuses", "b@both: it refuses"),
        ("g++:\n  error:  no", "g++: error: no"),
        ("x" * 161, "x" * 157 + "..."),
    ],
)
def test_a_cause_is_one_short_line_without_the_candidates_name(reason: str, said: str) -> None:
    assert verdict.cause(trial("blocked", reason)) == said


def test_many_causes_and_many_names_are_cut() -> None:
    many = [trial("blocked", "no compiler", label) for label in "abcdef"]
    others = [trial("error", f"cause {k}", f"x{k}") for k in range(4)]
    told = verdict.not_tried([*others, *many])
    assert told == (
        "10 of 10 candidates could not be tried: no compiler (a, b, c, d and 2 more); "
        "cause 0 (x0); cause 1 (x1); 2 more for other reasons"
    )
