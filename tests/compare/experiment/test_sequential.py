"""Looking at every value must not make the tests lie: simulated under fixed seeds, 1000 runs each."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from autotune.compare.experiment import sequential
from autotune.compare.experiment.sequential import START, START_SKEWED, Control, Interval, Moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

RUNS, VALUES, ALPHA = 1000, 600, 0.05
LOOKS = np.arange(1, VALUES + 1)


def contaminated(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """Log ratios with 5 % noise, 1 in 20 of them off by a factor of 10 in either direction."""
    outliers = (rng.random(size) < 0.05) * rng.choice([-1, 1], size) * math.log(10)
    return 0.05 * rng.standard_normal(size) + outliers


DISTRIBUTIONS: dict[str, tuple[int, Callable[..., NDArray[np.float64]]]] = {
    "normal": (START, lambda rng, size: rng.standard_normal(size)),
    "heavy tails": (START, lambda rng, size: rng.standard_t(3, size)),
    "outliers": (START, contaminated),
    "skew": (START_SKEWED, lambda rng, size: rng.exponential(size=size) - 1),
}


def running(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation [R, N] of the first 1, 2, ..., N values."""
    mean = np.cumsum(values, 1) / LOOKS
    variance = (np.cumsum(values**2, 1) - LOOKS * mean**2) / np.maximum(LOOKS - 1, 1)
    return mean, np.sqrt(np.maximum(variance, 0))


def widths(alpha: float) -> NDArray[np.float64]:
    return np.array([sequential.half_width(int(n), 1.0, alpha) for n in LOOKS])


def ever(outside: NDArray[np.bool_], start: int) -> float:
    """Share of runs in which something was so at any look from `start` values on."""
    return float(outside[:, start - 1 :].any(axis=1).mean())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_peeking_is_sound_for_means(name: str) -> None:
    start, draw = DISTRIBUTIONS[name]
    mean, std = running(draw(np.random.default_rng(1), (RUNS, VALUES)))
    assert ever(np.abs(mean) > widths(ALPHA) * std, start) <= ALPHA


def test_a_fixed_sample_test_is_not_sound_under_peeking() -> None:
    mean, std = running(np.random.default_rng(1).standard_normal((RUNS, VALUES)))
    assert ever(np.abs(mean) > 1.96 * std / np.sqrt(LOOKS), START) > 0.3


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.97])
def test_peeking_is_sound_for_rates(rate: float) -> None:
    hits = np.cumsum(np.random.default_rng(2).random((RUNS, VALUES)) < rate, axis=1)  # [R, N]
    bars = {
        (int(k), int(n)): sequential.log_mixture(int(k), int(n), rate) >= -math.log(ALPHA)
        for n in LOOKS
        for k in np.unique(hits[:, n - 1])
    }
    missed = np.array([[bars[int(k), n] for n, k in enumerate(run, 1)] for run in hits])
    assert ever(missed, 1) <= ALPHA


def test_peeking_is_sound_for_unpaired_means() -> None:
    rng = np.random.default_rng(3)
    few, few_std = running(1 + 0.5 * rng.standard_normal((RUNS, VALUES)))
    many, many_std = running(1 + 0.5 * rng.standard_normal((RUNS, VALUES)))
    half = widths(ALPHA / 2)
    assert ever(np.abs(few - many) > half * (few_std + many_std), START) <= ALPHA


@pytest.mark.parametrize(("excess", "std", "control"), [(0.05, 0.1, math.inf), (0.1, 0.3, 1.0), (0.2, 0.3, 3.0)])
def test_the_number_of_requests_stated_for_a_mean_is_kept(excess: float, std: float, control: float) -> None:
    stated = sequential.requests_to_see_mean(excess, std, ALPHA, control=Control(control))
    assert stated is not None
    rng = np.random.default_rng(4)
    known = math.isinf(control)
    late = 0
    for _ in range(200):
        worse = rng.normal(excess, std, stated)
        here = Moments(stated, float(worse.mean()), float(worse.var() * stated))
        interval = sequential.mean_interval(here, ALPHA)
        if not known:
            n = int(stated * control)
            others = rng.normal(0, std, n)
            there = Moments(n, float(others.mean()), float(others.var() * n))
            interval = sequential.mean_difference(there, here, ALPHA)
        late += interval.low <= 0
    assert late / 200 <= 0.08  # 5 %, and the simulation's own error


@pytest.mark.parametrize(("rate", "limit", "control"), [(0.12, 0.02, math.inf), (0.3, 0.02, 9.0), (1.0, 0.02, 1.0)])
def test_the_number_of_requests_stated_for_a_rate_is_kept(rate: float, limit: float, control: float) -> None:
    stated = sequential.requests_to_see_rate(rate, limit, ALPHA, control=Control(control))
    assert stated is not None
    rng = np.random.default_rng(5)
    late = sum(not stops(rng.random(stated) < rate, limit, control) for _ in range(200))
    assert late / 200 <= 0.08


def stops(failures: NDArray[np.bool_], limit: float, control: float) -> bool:
    hits = 0
    for n, failed in enumerate(failures, 1):
        hits += bool(failed)
        if math.isinf(control):
            low = sequential.rate_interval(hits, n, ALPHA).low
        else:
            fine = Moments(int(n * control))
            low = sequential.rate_difference(fine, Moments(n, hits / n), ALPHA).low
        if low > limit:
            return True
    return False


def test_too_small_an_effect_has_no_number_of_requests() -> None:
    assert sequential.requests_to_see_mean(1e-4, 1.0, ALPHA) is None
    assert sequential.requests_to_see_rate(0.0201, 0.02, ALPHA) is None


@pytest.mark.parametrize(
    ("hits", "n", "expected"),
    [
        (0, 0, (0.0, 1.0)),
        (0, 10, (0.0, None)),
        (10, 10, (None, 1.0)),
        (5, 100, (None, None)),
        (99_999, 100_000, (None, None)),
    ],
)
def test_the_interval_of_a_rate_is_where_the_mixture_is_below_the_bar(
    hits: int, n: int, expected: tuple[float | None, float | None]
) -> None:
    found = sequential.rate_interval(hits, n, ALPHA)
    for edge, known in zip((found.low, found.high), expected, strict=True):
        if known is not None:
            assert edge == known
        else:
            assert sequential.log_mixture(hits, n, edge) == pytest.approx(-math.log(ALPHA), rel=1e-6)
    assert n == 0 or found.low <= hits / n <= found.high


def test_no_failure_in_n_requests_by_hand() -> None:
    """B(1/2, n + 1/2) / B(1/2, 1/2) / (1 - p)^n = 1 / alpha, solved for p at n = 1: B(1/2, 3/2) / B(1/2, 1/2) = 1/2."""
    assert sequential.rate_interval(0, 1, ALPHA).high == pytest.approx(1 - ALPHA / 2)


def test_the_half_width_by_hand() -> None:
    r = (2 * math.log(20) + math.log(1 + 2 * math.log(20))) / 200
    expected = 3 * math.sqrt(2 * (50 * r + 1) / (2500 * r) * math.log(math.sqrt(50 * r + 1) / 0.05))
    assert sequential.half_width(50, 3.0, 0.05) == pytest.approx(expected)


def test_moments_are_those_of_all_values() -> None:
    values = np.random.default_rng(6).normal(5, 2, 300)
    moments = Moments()
    for value in values:
        moments = moments.add(float(value))
    assert moments.n == 300
    assert moments.mean == pytest.approx(values.mean())
    assert moments.std == pytest.approx(values.std(ddof=1))
    assert math.isnan(Moments(1, 2.0).std)


def test_nothing_is_said_of_a_mean_before_there_are_values() -> None:
    assert sequential.mean_interval(Moments(START - 1, 1.0, 1.0), ALPHA) == Interval(-math.inf, math.inf)
    assert sequential.mean_interval(Moments(START, 1.0, 1.0), ALPHA).low > 0


@pytest.mark.parametrize("parts", [([], []), ([1.0], []), ([], [2.0, 4.0]), ([1.0, 5.0, 2.5], [0.5, -3.0])], ids=str)
def test_merged_statistics_are_those_of_all_values(parts: tuple[list[float], list[float]]) -> None:
    def moments(values: list[float]) -> Moments:
        return functools.reduce(Moments.add, values, Moments())

    merged, together = moments(parts[0]).merged(moments(parts[1])), moments(parts[0] + parts[1])
    assert merged.n == together.n
    assert merged.mean == pytest.approx(together.mean)
    assert merged.squares == pytest.approx(together.squares)
