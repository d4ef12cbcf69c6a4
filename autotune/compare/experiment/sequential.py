"""Confidence sequences for means, rates and differences, which stay valid for any number of looks. Pure.

A fixed-sample interval is valid at one look, which was planned before. A confidence sequence (L_n, U_n) is valid at all
looks at once: P(for some n the truth is outside) <= alpha. So one may watch it live and stop when it is clear. It is
the dual of the always-valid p-value of the mixture sequential probability ratio test: it contains the values that this
test has not rejected yet (Johari, Pekelis and Walsh, Always Valid Inference, arXiv:1512.04922; KDD 2017).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# Least values before a mean is judged, because its sequences are asymptotic. Simulated with alpha = 5 % and a look at
# each of 1000 values, the share of runs with the truth ever outside was: with looks from 20 values on, 3.5 % for normal
# values, 2.8 % for Student's t with 3 degrees of freedom, and 8.3 % for exponential ones, whose rare large values come
# late; with looks from 100 values on, 4.4 % for exponential ones.
START = 20
START_SKEWED = 100
TUNED_FOR = 200  # number of values at which the sequences for means are about as narrow as possible
MAX_REQUESTS = 100_000  # largest number of requests that the search considers
MAX_RATE_REQUESTS = 10_000  # requests up to which a rate's detection is computed, step by step
PRIOR = 0.5  # both parameters of the beta mixture: Jeffreys' prior, which is good for rates near 0


@dataclass(frozen=True)
class Moments:
    """Statistics of a stream of values; a rate is the mean of zeros and ones.

    Args:
        n: number of values.
        mean: their mean.
        squares: sum of their squared deviations from the mean.
    """

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> Moments:
        """Return the statistics with one more value (Welford, Technometrics 1962)."""
        n, off = self.n + 1, value - self.mean
        mean = self.mean + off / n
        return Moments(n, mean, self.squares + off * (value - mean))

    def merged(self, other: Moments) -> Moments:
        """Return the statistics of both streams (Chan, Golub and LeVeque, The American Statistician 1983)."""
        n, apart = self.n + other.n, other.mean - self.mean
        if not n:
            return self
        squares = self.squares + other.squares + apart * apart * self.n * other.n / n
        return Moments(n, self.mean + apart * other.n / n, squares)

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / (self.n - 1)) if self.n > 1 else math.nan

    @property
    def hits(self) -> int:
        """Number of ones, if the values are zeros and ones."""
        return round(self.mean * self.n)


@dataclass(frozen=True)
class Interval:
    """An interval from `low` to `high`; both may be infinite."""

    low: float
    high: float

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.high - other.low)


EVERYTHING = Interval(-math.inf, math.inf)


def half_width(n: int, std: float, alpha: float, tuned_for: int = TUNED_FOR) -> float:
    """Half-width of the asymptotic confidence sequence of a mean after `n` values.

    sqrt(2 (n r + 1) / (n^2 r) log(sqrt(n r + 1) / alpha)) standard deviations, from a Gaussian mixture with r = rho^2
    (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, Time-uniform central limit theory, arXiv:2103.06476, theorem 2.2),
    narrowest near n = `tuned_for` with r = (-2 log alpha + log(1 - 2 log alpha)) / tuned_for (ibid., appendix B.2).
    """
    r = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / tuned_for
    return std * math.sqrt(2 * (n * r + 1) / (n * n * r) * math.log(math.sqrt(n * r + 1) / alpha))


def mean_interval(values: Moments, alpha: float, start: int = START) -> Interval:
    """Confidence sequence of the mean of values with any distribution of finite variance.

    Args:
        values: the values so far.
        alpha: chance of ever missing the mean, both sides together.
        start: number of values below which it is infinite: `START`, or `START_SKEWED` if they may be skewed.
    """
    if values.n < start:
        return EVERYTHING
    half = half_width(values.n, values.std, alpha)
    return Interval(values.mean - half, values.mean + half)


def rate_interval(hits: int, n: int, alpha: float) -> Interval:
    """Confidence sequence of a rate: exact for any n, also for rates near 0.

    It contains the rates p for which the beta-binomial mixture martingale,
    B(a + k, a + n - k) / B(a, a) / (p^k (1 - p)^(n - k)), is below 1 / alpha (Robbins, Annals of Mathematical
    Statistics 1970; Howard, Ramdas, McAuliffe and Sekhon, Time-uniform, nonparametric, nonasymptotic confidence
    sequences, Annals of Statistics 2021, section 3.2).
    """
    if n == 0:
        return Interval(0.0, 1.0)
    best, bar = hits / n, -math.log(alpha)
    low = 0.0 if hits == 0 else _edge(0.0, best, lambda p: log_mixture(hits, n, p) < bar)
    high = 1.0 if hits == n else _edge(1.0, best, lambda p: log_mixture(hits, n, p) < bar)
    return Interval(low, high)


def log_mixture(hits: int, n: int, rate: float) -> float:
    """Logarithm of the beta-binomial mixture's likelihood over that of `rate`, which is in (0, 1)."""
    mixture = _log_beta(PRIOR + hits, PRIOR + n - hits) - _log_beta(PRIOR, PRIOR)
    return mixture - hits * math.log(rate) - (n - hits) * math.log1p(-rate)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _edge(outside: float, inside: float, holds: Callable[[float], bool]) -> float:
    """Bisect for the point between `inside`, where `holds` is true, and `outside`, where it is false."""
    for _ in range(60):
        middle = (outside + inside) / 2
        if middle in (outside, inside):
            break
        outside, inside = (outside, middle) if holds(middle) else (middle, inside)
    return outside


def mean_difference(control: Moments, candidate: Moments, alpha: float, start: int = START) -> Interval:
    """Confidence sequence of mean(candidate) - mean(control), for unpaired values.

    Each arm gets half of alpha, so no assumption is needed on how many requests each gets, or when. At a share of 1 %
    the control's part is negligible. At equal shares the interval is up to 1.4 times as wide as necessary.
    """
    return mean_interval(candidate, alpha / 2, start) - mean_interval(control, alpha / 2, start)


def rate_difference(control: Moments, candidate: Moments, alpha: float) -> Interval:
    """Confidence sequence of rate(candidate) - rate(control), like `mean_difference`."""
    there, here = (rate_interval(arm.hits, arm.n, alpha / 2) for arm in (candidate, control))
    return there - here


class Control(NamedTuple):
    """The control's requests while the candidate gets n: `before` + n * `per_request`. Infinite: its mean is known."""

    per_request: float = math.inf
    before: int = 0

    @property
    def is_known(self) -> bool:
        return math.isinf(self.per_request)

    def requests(self, n: int) -> int:
        return self.before + int(n * self.per_request)


KNOWN = Control()  # as where values are paired


@functools.lru_cache(maxsize=256)
def requests_to_see_mean(
    excess: float, std: float, alpha: float, *, control: Control = KNOWN, power: float = 0.95
) -> int | None:
    """Number of the candidate's requests in which `mean_difference` detects a mean that is `excess` over the limit.

    At that n, both half-widths plus the sampling error of the means are below the excess, so the chance of not having
    stopped is at most 1 - power. None if `MAX_REQUESTS` are too few.

    Args:
        excess: true difference minus the limit, in the values' units; above 0.
        std: standard deviation of the values, in each arm.
        alpha: as for `mean_difference`.
        control: the control's requests beside the candidate's.
        power: chance of having detected it by then.
    """
    z = NormalDist().inv_cdf(power)

    def seen(n: int) -> bool:
        if control.is_known:
            return half_width(n, std, alpha) + z * std * math.sqrt(1 / n) <= excess
        if (others := control.requests(n)) < START:
            return False
        half = half_width(n, std, alpha / 2) + half_width(others, std, alpha / 2)
        return half + z * std * math.sqrt(1 / n + 1 / others) <= excess

    return _first(seen)


def _first(seen: Callable[[int], bool]) -> int | None:
    """The least n >= `START` for which `seen` is true. Assumes that it stays true for larger n."""
    low, high = START - 1, START
    while not seen(high):
        if high >= MAX_REQUESTS:
            return None
        low, high = high, min(2 * high, MAX_REQUESTS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if seen(middle) else (middle, high)
    return high


@functools.lru_cache(maxsize=256)
def requests_to_see_rate(
    rate: float, limit: float, alpha: float, *, control: Control = KNOWN, power: float = 0.95
) -> int | None:
    """Number of the candidate's requests in which `rate_difference` detects `rate`, with a control without a hit.

    The result is exact: the loop tracks the distribution of the number of hits among the runs not stopped yet. None if
    MAX_RATE_REQUESTS are too few.

    Args:
        rate: the candidate's true rate.
        limit: how much it may exceed the control's rate.
        alpha, control, power: as for `requests_to_see_mean`.
    """
    share = alpha / (1 if control.is_known else 2)
    alive, bar = np.ones(1), 0  # chance of k hits without having stopped, k = 0, 1, ...
    for n in range(1, MAX_RATE_REQUESTS + 1):
        alive = np.append(alive * (1 - rate), 0.0) + np.append(0.0, alive * rate)
        over = limit if control.is_known else limit + rate_interval(0, control.requests(n), share).high
        while bar <= n and not (over < 1 and bar > n * over and _surpasses(bar, n, over, share)):
            bar += 1  # never lowered, which can only make the answer larger
        alive[bar:] = 0.0
        if alive.sum() <= 1 - power:
            return n
    return None


def _surpasses(hits: int, n: int, rate: float, alpha: float) -> bool:
    """Whether the lower end of `rate_interval` is above `rate`."""
    return rate <= 0 or log_mixture(hits, n, rate) >= -math.log(alpha)
