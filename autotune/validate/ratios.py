"""Ratios of paired times: how much faster, and how surely."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from . import Speedup
from .statistics import Floats, median_bounds
from .timing import Pair

Metric = Literal["ttft", "tpot", "end_to_end"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "end_to_end")

EARLY_ALPHA = 0.005  # in each tail, at each early look
FINAL_ALPHA = 0.025
# 99.5 % quantiles of Student's t by number of values, for use from there on
STUDENT = ((2, 63.66), (3, 9.925), (4, 5.841), (5, 4.604), (8, 3.499), (12, 3.106), (25, 2.797), (50, 2.680))


def p90_increase(pairs: Sequence[Pair], limit: float, alpha: float) -> tuple[float, float]:
    """How much the 90th percentile of end-to-end time grows, and what it surely grows by at least, as fractions.

    Bootstrapped, pairs drawn whole, only where it is over `limit`: otherwise the point decides.
    """
    times = np.array([[p.reference.end_to_end_s, p.candidate.end_to_end_s] for p in pairs])  # [N, 2]
    reference, candidate = np.quantile(times, 0.9, axis=0)
    point = float(candidate / reference - 1)
    if point <= limit:
        return point, point
    drawn = times[np.random.default_rng(0).integers(0, len(times), size=(1000, len(times)))]  # [R, N, 2]
    p90 = np.quantile(drawn, 0.9, axis=1)  # [R, 2]
    return point, float(np.quantile(p90[:, 1] / p90[:, 0] - 1, alpha))


def bounds(values: Floats, early: bool = False) -> tuple[float, float]:
    """Bounds of the median: by bootstrap, and at an early look the wider of that and Student's.

    A bootstrap of so few values alone would be too sure of itself.
    """
    alpha = EARLY_ALPHA if early else FINAL_ALPHA
    low, high = median_bounds(values, alpha)
    if early:
        t = [quantile for count, quantile in STUDENT if count <= len(values)][-1]
        half = t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        low, high = min(low, float(np.mean(values)) - half), max(high, float(np.mean(values)) + half)
    return low, high


def log_ratios(pairs: Sequence[Pair], metric: Metric) -> Floats:
    """log(reference / candidate) [N] of one bucket's pairs; NaN where a pair is polluted or the metric is undefined."""
    both = np.array([[getattr(p.reference, f"{metric}_s"), getattr(p.candidate, f"{metric}_s")] for p in pairs])
    both[[bool(p.polluted) for p in pairs]] = np.nan
    ratios: Floats = np.log(both[:, 0]) - np.log(both[:, 1])
    return ratios


def pooled(ratios: Mapping[str, Mapping[Metric, Floats]], metric: Metric) -> Floats:
    """Log ratios [N] over all buckets: the mean of each turn, or the worst bucket's where they differ in sign."""
    by = [values[metric] for values in ratios.values() if len(known(values[metric]))]
    if not by:
        return np.full(1, np.nan)
    medians = [float(np.median(known(values))) for values in by]
    if min(medians) < 0 < max(medians):
        return by[int(np.argmin(medians))]
    turns = np.stack([values[: min(map(len, by))] for values in by])  # [buckets, N]
    there = ~np.isnan(turns)
    count = there.sum(axis=0)
    means: Floats = np.where(there, turns, 0.0).sum(axis=0)[count > 0] / count[count > 0]
    return means


def known(values: Floats) -> Floats:
    """`values` without NaN."""
    kept: Floats = values[~np.isnan(values)]
    return kept


def speedup(log_values: Floats) -> Speedup:
    """Median ratio with its 95 % bootstrap interval."""
    values = known(log_values)
    if not len(values):
        return Speedup(math.nan, math.nan, math.nan, 0)
    low, high = bounds(values)
    return Speedup(math.exp(float(np.median(values))), math.exp(low), math.exp(high), len(values))
