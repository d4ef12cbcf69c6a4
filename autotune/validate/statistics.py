"""Bounds by bootstrap, on plain arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def cluster_means(values: Floats, clusters: NDArray[np.int64], resamples: int = 2000, seed: int = 0) -> Floats:
    """Bootstrap distribution of a mean whose values come in clusters; whole clusters are drawn.

    Tokens of one prompt are alike, so drawing tokens would pretend to more evidence than there is (Davison and
    Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).

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


def median_draws(values: Floats, resamples: int = 2000, seed: int = 0) -> Floats:
    """Bootstrap distribution [R] of the median of `values` [N]."""
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(0, len(values), size=(resamples, len(values)))]  # [R, N]
    medians: Floats = np.median(drawn, axis=1)
    return medians


def spread(values: Floats) -> float:
    """Interquartile range."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(high - low)
