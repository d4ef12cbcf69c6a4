"""What follows from pairs: by hand."""

from __future__ import annotations

import math

import pytest

from autotune.compare.experiment.pareto import Point, dominates, front, plotted
from autotune.compare.experiment.results import Outcome
from autotune.compare.experiment.verdicts import Terms, cells, chance, conclude, correct, holm, is_settled, weigh
from autotune.validate import Quality, Verdict
from autotune.validate.limits import Limits
from autotune.validate.ratios import decide
from autotune.validate.timing import Pair, Timing

TERMS = Terms("end_to_end", Limits(), 0.0)
B1, B4 = "b1/p8/n8", "b4/p8/n8"


def pair(ratio: float) -> Pair:
    return Pair(Timing(0.1, 0.01, 1.0), Timing(0.1, 0.01, 1.0 / ratio))


@pytest.mark.parametrize(
    ("ratios", "noise", "expected"),
    [
        ([1.5] * 8, 0.0, 1 / 256),
        ([1.5] * 7 + [1.0], 0.0, 9 / 256),
        ([1.0] * 8, 0.0, 1.0),
        ([1.02] * 8, 0.0, 1.0),  # below the least gain of 3 %
        ([1.05] * 8, 0.03, 1.0),  # below twice the noise
        ([1.5] * 4, math.inf, 1.0),
        ([], 0.0, 1.0),
    ],
)
def test_the_sign_test(ratios: list[float], noise: float, expected: float) -> None:
    assert chance({B1: [pair(r) for r in ratios]}, Terms("end_to_end", Limits(), noise)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("chances", "standing"),
    [
        ({"a": 0.02}, "a"),
        ({"a": 0.03}, ""),
        ({"a": 0.001, "b": 0.012, "c": 0.02}, "abc"),  # 0.025 / 3, / 2, / 1
        ({"a": 0.001, "b": 0.013, "c": 0.013}, "a"),  # 0.013 is over 0.0125, and the rest falls with it
        ({"a": 0.009, "b": 0.009, "c": 0.009}, ""),
        ({}, ""),
    ],
)
def test_holm(chances: dict[str, float], standing: str) -> None:
    assert holm(chances) == frozenset(standing)


def test_thirty_null_candidates_seldom_stand() -> None:
    """Of candidates without a gain, each pair above the gate with a chance of one half, few experiments pass one."""
    import random

    draw = random.Random(0)
    passed = 0
    for _ in range(200):
        heads = [sum(draw.random() < 0.5 for _ in range(25)) for _ in range(30)]
        chances = {str(k): sum(math.comb(25, j) for j in range(h, 26)) / 2**25 for k, h in enumerate(heads)}
        passed += bool(holm(chances))
    assert passed <= 10  # 2.5 % of 200 is 5


@pytest.mark.parametrize(
    ("ratio", "count", "candidates", "settled"),
    [(1.5, 8, 1, True), (1.5, 8, 3, False), (1.5, 12, 3, True), (1.0, 5, 30, True), (1.5, 5, 1, False)],
)
def test_when_the_answer_is_clear(ratio: float, count: int, candidates: int, settled: bool) -> None:
    assert is_settled({B1: [pair(ratio)] * count}, TERMS, candidates) is settled


def test_several_candidates_are_corrected() -> None:
    pairs = {"a": {B1: [pair(1.5)] * 7}, "b": {B1: [pair(1.0)] * 7}, "c": {B1: [pair(1.5)] * 6}}
    latencies = {n: decide(p, TERMS.objective, TERMS.limits, 0.0) for n, p in pairs.items()}
    found = correct(latencies, {n: chance(p, TERMS) for n, p in pairs.items()})
    assert found["a"][0] is Verdict.PASS  # 1/128 is under 0.025 / 3
    assert found["b"][0] is Verdict.FAIL
    assert found["c"][0] is Verdict.INCONCLUSIVE  # 1/64 is over 0.025 / 2
    assert "one of 3 candidates (p = 0.016, Holm at 0.025)" in found["c"][1]


def test_cells_are_their_own() -> None:
    small, large = cells({B1: [pair(1.5)] * 8, B4: [pair(0.8)] * 8}, TERMS)
    assert (small.verdict, large.verdict) == (Verdict.PASS, Verdict.FAIL)
    assert (small.tokens_per_s, small.control_tokens_per_s) == pytest.approx((12.0, 8.0))
    assert large.tokens_per_s == pytest.approx(32 * 0.8)


GOOD, BAD, DIM, DEAD = (Quality("strict", v, f"q {v}") for v in Verdict)


@pytest.mark.parametrize(
    ("latency", "quality", "ratio", "verdict", "words"),
    [
        ("pass", GOOD, 1.0, Verdict.PASS, "l; quality q pass"),
        ("pass", None, 1.0, Verdict.PASS, "l; quality not compared: why"),
        ("pass", GOOD, 2.5, Verdict.FAIL, "memory: 2.50 kB is over 2 times the control's 1.00 kB"),
        ("pass", BAD, 1.0, Verdict.FAIL, "quality: q fail"),
        ("fail", GOOD, 1.0, Verdict.FAIL, "latency: l"),
        ("fail", BAD, 1.0, Verdict.FAIL, "quality: q fail"),
        ("inconclusive", BAD, 1.0, Verdict.FAIL, "quality: q fail"),
        ("pass", DIM, 1.0, Verdict.INCONCLUSIVE, "quality: q inconclusive"),
        ("fail", DEAD, 1.0, Verdict.ERROR, "quality: q error"),
    ],
)
def test_what_decides(latency: str, quality: Quality | None, ratio: float, verdict: Verdict, words: str) -> None:
    assert weigh((Verdict(latency), "l"), quality, "why", (1000 * ratio, 1000.0), 2.0) == (verdict, words)


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (("pass", "fail"), "pass"),
        (("fail", "fail"), "fail"),
        (("fail", "error"), "fail"),
        (("fail", "inconclusive"), "inconclusive"),
        (("error", "error"), "error"),
        (("error", "inconclusive"), "inconclusive"),
    ],
)
def test_the_whole(verdicts: tuple[str, ...], whole: str) -> None:
    assert conclude([Outcome(v, "", "", Verdict(v), "") for v in verdicts])[0] == whole


CONTROL = Point("control", 1.0, 0.0, 100)
FAST = Point("fast", 2.0, 0.1, 50)


@pytest.mark.parametrize(
    ("points", "names"),
    [
        ([CONTROL, FAST], ["fast", "control"]),
        ([CONTROL, FAST, Point("slow", 0.9, 0.0, 100)], ["fast", "control"]),
        ([CONTROL, Point("twin", 1.0, 0.0, 100)], ["control", "twin"]),
        ([CONTROL, FAST, Point("small", 1.5, 0.2, 20)], ["fast", "small", "control"]),
        ([CONTROL, FAST, Point("unjudged", 1.9, math.inf, 50)], ["fast", "control"]),
        ([CONTROL, Point("better", 1.1, 0.0, 100)], ["better"]),
        ([], []),
    ],
)
def test_the_front(points: list[Point], names: list[str]) -> None:
    assert [point.name for point in front(points)] == names


def test_nothing_dominates_itself() -> None:
    assert not dominates(FAST, FAST)
    assert not dominates(FAST, CONTROL)
    assert not dominates(CONTROL, FAST)


def test_the_plot() -> None:
    lines = plotted([CONTROL, FAST, Point("unjudged", 3.0, math.inf, 1)]).splitlines()
    first, second = (next(i for i, line in enumerate(lines) if mark in line[8:]) for mark in ("1", "2"))
    assert second < first  # faster is higher
    assert lines[second].index("2", 8) > lines[first].index("1", 8)  # further from the control is to the right
    assert plotted([]) == ""
