"""What callers gain from being decoded together, as values, and whether that is enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from ..validate.statistics import median_bounds

if TYPE_CHECKING:
    from ..runtime.batching.load import EngineLoad

LEAST_GAIN = 1.1  # times the tokens per second that the best number of callers must bring
MOST_LOST = 0.03  # share of its tokens per second that a single caller may lose
LOOKS = (12, 24, 48)  # requests of a single caller, served both ways, after which a clear result ends its measurement
DOUBT = 0.025 / len(LOOKS)  # in each tail of the interval: together, looks are wrong in one of 20 cases (Bonferroni)


@dataclass(frozen=True)
class CallersPoint:
    """So many callers at once, decoded together.

    Args:
        callers: their number.
        tokens_per_s: of all of them, by round; for a single caller by request.
        ratios: the same, divided by those of one caller at a time without it, measured beside them.
        ttft_s: time to the first token, by request.
        tpot_s: time per further token, by request.
        prompt_tokens: of a request, on average; 0: unknown.
    """

    callers: int
    tokens_per_s: tuple[float, ...]
    ratios: tuple[float, ...]
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...] = ()
    prompt_tokens: float = 0.0


@dataclass(frozen=True)
class Sharing:
    """What decoding callers together brings.

    Args:
        reason: the decision in a sentence with numbers.
        rows: how many callers are decoded together at most; 0: they are served one at a time.
        alone_tokens_per_s: one caller at a time, without it, by request.
        points: with it, by number of callers.
        differing: answers that were not those of a request alone.
        tied: further ones that parted from those where two tokens are as good, which only a GPU is allowed.
        gap_s: longest time between two tokens of running answers while a long prompt arrives; None: not measured.
        long_prompt: tokens of that prompt.
        new_tokens: of each answer; 0: unknown.
        reads_s: tokens of a prompt that shares nothing with an earlier one -> seconds to its first token, alone.
        steps_s: number of sequences -> mean seconds of a step that decodes so many.
    """

    reason: str
    rows: int = 0
    alone_tokens_per_s: tuple[float, ...] = ()
    points: tuple[CallersPoint, ...] = ()
    differing: int = 0
    gap_s: float | None = None
    long_prompt: int = 0
    new_tokens: int = 0
    reads_s: Mapping[int, float] = field(default_factory=dict)
    steps_s: Mapping[int, float] = field(default_factory=dict)
    tied: int = 0


def is_clear(ratios: Sequence[float]) -> bool:
    """Whether what a single caller gets, by request, is surely on one side of the most it may lose."""
    low, high = median_bounds(np.asarray(ratios), DOUBT)
    return low >= 1 - MOST_LOST or high < 1 - MOST_LOST


def decide(measured: Sharing, most_tpot_s: float = math.inf) -> tuple[int, str]:
    """How many callers are decoded together at most, 0 for one at a time, and why. Pure.

    Args:
        most_tpot_s: most time per token that one of several callers may take.
    """
    if measured.differing:
        return 0, f"{measured.differing} answers were not those of the same requests alone"
    single, *many = measured.points
    kept = median(single.ratios)
    if kept < 1 - MOST_LOST:
        return 0, f"a single caller would get {kept:.2f}x the tokens per second, below {1 - MOST_LOST:.2f}x"
    quick = [point for point in many if median(point.tpot_s) <= most_tpot_s]
    limit = f"over max_tpot_ms of the policy, {1e3 * most_tpot_s:.3g}"
    if not quick:
        took_s = median(many[0].tpot_s)
        return 0, f"{many[0].callers} callers would get a token every {1e3 * took_s:.3g} ms each, {limit}"
    best = max(quick, key=lambda point: median(point.ratios))
    gains = best.ratios
    figures = (
        f"{best.callers} callers get {median(gains):.2f}x ({min(gains):.2f} to {max(gains):.2f}) the tokens per second "
        f"of one at a time, and a single caller {kept:.2f}x"
    )
    if slow := [point for point in many if point not in quick]:
        figures += f"; {slow[0].callers} would get a token every {1e3 * median(slow[0].tpot_s):.3g} ms each, {limit}"
    if measured.tied:
        figures += f"; {measured.tied} answers parted from those of a request alone where two tokens are as good"
    accepted = min(gains) > 1 and median(gains) >= LEAST_GAIN
    return (max(point.callers for point in quick) if accepted else 0), figures


def step_times(before: EngineLoad, after: EngineLoad, numbers: Sequence[int]) -> dict[int, float]:
    """Mean seconds of the steps between two moments, by how many sequences they decoded.

    Args:
        numbers: of sequences that are asked for. One that no step decoded is left out.
    """
    counts = {n: after.steps.get(n, 0) - before.steps.get(n, 0) for n in numbers}
    spent_s = {n: after.stepped_s.get(n, 0.0) - before.stepped_s.get(n, 0.0) for n in numbers}
    return {n: spent_s[n] / count for n, count in counts.items() if count}
