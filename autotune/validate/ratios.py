"""Ratios of paired times: how much faster, and how surely."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from . import Speedup
from .statistics import Floats, median_draws
from .timing import Pair

Metric = Literal["ttft", "tpot", "end_to_end"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "end_to_end")

EARLY_ALPHA = 0.005  # in each tail, at each early look
FINAL_ALPHA = 0.025
# 99.5 % quantiles of Student's t by number of values, for use from there on
STUDENT = ((2, 63.66), (3, 9.925), (4, 5.841), (5, 4.604), (8, 3.499), (12, 3.106), (25, 2.797), (50, 2.680))


def p90_increases(times: Floats, resamples: int = 1000) -> Floats:
    """How much the 90th percentile grows from column 0 to column 1.

    Args:
        times: [N, 2], seconds; rows are drawn whole.
        resamples: number of draws R.

    Returns:
        [R] increases as fractions.
    """
    drawn = times[np.random.default_rng(0).integers(0, len(times), size=(resamples, len(times)))]  # [R, N, 2]
    p90 = np.quantile(drawn, 0.9, axis=1)  # [R, 2]
    increases: Floats = p90[:, 1] / p90[:, 0] - 1
    return increases


def bounds(values: Floats, early: bool = False) -> tuple[float, float]:
    """Bounds of the median: by bootstrap, and at an early look the wider of that and Student's.

    A bootstrap of so few values alone would be too sure of itself.
    """
    alpha = EARLY_ALPHA if early else FINAL_ALPHA
    low, high = (float(q) for q in np.quantile(median_draws(values), [alpha, 1 - alpha]))
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
