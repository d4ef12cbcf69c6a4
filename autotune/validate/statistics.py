"""Bootstrap bounds on plain arrays."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def cluster_means(values: Floats, clusters: NDArray[np.int64], resamples: int = 2000, seed: int = 0) -> Floats:
    """Return the bootstrap distribution of a mean whose values come in clusters. Whole clusters are drawn.

    Tokens of one prompt are alike, so drawing single tokens would overstate the evidence (Davison and Hinkley,
    Bootstrap Methods and their Application, 1997, section 3.8).

    Args:
        values: [T].
        clusters: [T] any integer labels.
        resamples: number of draws R.
        seed: of the draws.

    Returns:
        [R] means.
    """
    _, index = np.unique(clusters, return_inverse=True)
    count = np.bincount(index).astype(np.float64)  # [C]
    total = np.bincount(index, weights=values)  # [C]
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(count), np.full(len(count), 1 / len(count)), size=resamples)  # [R, C]
    means: Floats = (drawn @ total) / (drawn @ count)
    return means


def median_bounds(values: Floats, alpha: float) -> tuple[float, float]:
    """Return the bootstrap interval of the median of `values` [N], with `alpha` in each tail.

    It is computed exactly, without resampling: the bootstrap's distribution of an order statistic is binomial (Maritz
    and Jarrett, A Note on Estimating the Variance of the Sample Median, JASA 1978). For even N, it is the mean of the
    intervals of the two middle values.
    """
    ordered, n = np.sort(values), len(values)
    middle = ((n + 1) // 2, n // 2 + 1)  # the same rank twice for odd N
    low = np.mean([ordered[_rank(n, m, alpha)] for m in middle])
    high = np.mean([ordered[_rank(n, m, 1 - alpha)] for m in middle])
    return float(low), float(high)


@functools.cache
def _rank(n: int, m: int, p: float) -> int:
    """Index of the p-quantile of the bootstrap's m-th smallest of n values."""
    for k in range(1, n):
        share = k / n  # share of the values that are at most the k-th
        at_most = sum(math.comb(n, j) * share**j * (1 - share) ** (n - j) for j in range(m, n + 1))
        if at_most >= p:
            return k - 1
    return n - 1


def spread(values: Floats) -> float:
    """Return the interquartile range."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(high - low)
