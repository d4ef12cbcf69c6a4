"""Limits on scripted figures."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autotune.compare.experiment import guardrails
from autotune.compare.experiment.guardrails import STANDARD, Guardrail, conclude, judge, stated_bound
from autotune.compare.experiment.sequential import Moments
from autotune.errors import ExperimentError
from autotune.validate import Verdict

ERRORS, TTFT, TPOT = STANDARD
LENGTH = Guardrail("length", "mean", 5.0, lambda prompt, answer: answer.shape[1], worse="lower")


def spread(n: int, mean: float, std: float = 0.1) -> Moments:
    return Moments(n, mean, std**2 * (n - 1))


CASES: dict[str, tuple[Guardrail, Moments | None, Moments, Verdict]] = {
    "no failure in many": (ERRORS, spread(2000, 0.0, 0), spread(2000, 0.0, 0), Verdict.PASS),
    "no failure in a few": (ERRORS, spread(2000, 0.0, 0), spread(20, 0.0, 0), Verdict.INCONCLUSIVE),
    "failures in all of a few": (ERRORS, spread(2000, 0.0, 0), spread(6, 1.0, 0), Verdict.FAIL),
    "as many failures as the control": (ERRORS, Moments(4000, 0.1), Moments(4000, 0.1), Verdict.INCONCLUSIVE),
    "failures that the control never had": (ERRORS, None, Moments(50, 0.4), Verdict.FAIL),
    "as fast": (TTFT, spread(300, 1.0), spread(300, 1.0), Verdict.PASS),
    "much slower": (TPOT, spread(300, 1.0), spread(300, 1.4), Verdict.FAIL),
    "slower by the limit": (TPOT, spread(300, 1.0), spread(300, 1.0 + math.log(1.1)), Verdict.INCONCLUSIVE),
    "much faster": (TPOT, spread(300, 1.0), spread(300, 0.4), Verdict.PASS),
    "slower, in pairs": (TPOT, None, spread(100, 0.3), Verdict.FAIL),
    "too few pairs": (TPOT, None, spread(10, 0.3), Verdict.INCONCLUSIVE),
    "nothing at all": (TPOT, Moments(), Moments(), Verdict.INCONCLUSIVE),
    "much shorter answers": (LENGTH, spread(500, -60, 9), spread(500, -40, 9), Verdict.FAIL),
    "longer answers": (LENGTH, spread(500, -60, 9), spread(500, -80, 9), Verdict.PASS),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_figures_say(name: str) -> None:
    guardrail, control, candidate, verdict = CASES[name]
    found = judge(guardrail, control, candidate, 0.01)
    assert found.verdict is verdict
    assert found.text.startswith(guardrail.name)
    assert found.requests == candidate.n


@pytest.mark.parametrize(
    ("guardrail", "raw", "scaled"),
    [
        (ERRORS, True, 1.0),
        (ERRORS, False, 0.0),
        (Guardrail("helpful", "rate", 0.1, lambda p, a: True, worse="lower"), True, 0.0),
        (TTFT, math.e, 1.0),
        (TTFT, 0.0, None),
        (TTFT, None, None),
        (TPOT, math.nan, None),
        (TPOT, math.inf, None),
        (LENGTH, -math.inf, None),
        (LENGTH, 7, -7.0),
    ],
)
def test_larger_is_always_worse(guardrail: Guardrail, raw: Any, scaled: float | None) -> None:
    assert guardrail.scale(raw) == (None if scaled is None else pytest.approx(scaled))


VERDICTS: dict[str, tuple[tuple[str, ...], Verdict, str]] = {
    "one fails": (("as fast", "much slower"), Verdict.FAIL, "over the limit: tpot +49.2%"),
    "one is open": (("as fast", "too few pairs"), Verdict.INCONCLUSIVE, "open: tpot +35.0% not enough to say"),
    "all hold": (("as fast", "much faster"), Verdict.PASS, "within every limit: ttft +0.0%"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_and_the_sentence_that_decided(name: str) -> None:
    cases, verdict, opening = VERDICTS[name]
    found = conclude([judge(*CASES[case][:3], 0.01) for case in cases])
    assert found[0] is verdict
    assert found[1].startswith(opening)


def test_figures_grow_by_what_was_measured() -> None:
    figures = guardrails.add(guardrails.add({}, {"errors": 1.0, "ttft": None}), {"errors": 0.0, "ttft": 2.0})
    assert figures == {"errors": Moments(2, 0.5, 0.5), "ttft": Moments(1, 2.0, 0.0)}


BOUNDS: dict[str, tuple[Guardrail, dict[str, Any], str]] = {
    "rate": (ERRORS, {"share": 0.5}, "errors: a rate of 12% is caught within "),
    "ratio, unseen": (TPOT, {"share": 0.5}, "at the assumed spread of 0.5"),
    "ratio, seen": (
        TPOT,
        {"share": 0.01, "std": 0.1},
        "tpot: +20% is caught within 49 requests, at the seen spread of 0.1",
    ),
    "mean, unseen": (LENGTH, {"share": 0.5}, "length: its spread is not known yet"),
    "mean, seen": (LENGTH, {"share": 0.5, "std": 1.0}, "length: +10 is caught within 100 requests"),
    "rate, hopeless": (Guardrail("errors", "rate", 0.999), {"share": 1e-6}, "requests, of 100% within over 10000"),
    "all requests, after few of the control's": (
        TPOT,
        {"share": 1.0, "std": 0.1, "before": 30},
        "tpot: +20% is caught within over 100000 requests",
    ),
    "all requests, after many of the control's": (
        TPOT,
        {"share": 1.0, "std": 0.1, "before": 5000},
        "tpot: +20% is caught within 49 requests",
    ),
    "all requests, nothing to compare with": (TPOT, {"share": 1.0}, "tpot: nothing is caught, because the control"),
    "hopeless": (TPOT, {"std": 99.0}, "tpot: +20% is caught within over 100000 requests"),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bound_is_stated(name: str) -> None:
    guardrail, known, part = BOUNDS[name]
    assert part in stated_bound(guardrail, 0.01, **known)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_the_bound_does_not_depend_on_the_unit_of_a_metric(unit: float) -> None:
    rail = Guardrail("cost", "mean", 0.1 * unit, lambda prompt, new: 0.0)
    assert "is caught within 1618 requests" in stated_bound(rail, 0.0125, std=0.4 * unit, share=0.5)


BAD: dict[str, Any] = {
    "negative": lambda: Guardrail("x", "mean", -1.0, lambda p, a: 1.0),
    "not a number": lambda: Guardrail("x", "mean", math.nan, lambda p, a: 1.0),
    "a rate of more than all": lambda: Guardrail("x", "rate", 1.0, lambda p, a: True),
    "kind": lambda: Guardrail("x", "median", 1.0),
    "direction": lambda: Guardrail("x", "mean", 1.0, worse="up"),
    "not a guardrail": lambda: guardrails.checked([0.1]),
    "twice": lambda: guardrails.checked([ERRORS, ERRORS]),
    "none": lambda: guardrails.checked([]),
    "nothing to measure": lambda: guardrails.checked([Guardrail("helpful", "rate", 0.1)]),
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_is_refused(name: str) -> None:
    with pytest.raises(ExperimentError):
        BAD[name]()
