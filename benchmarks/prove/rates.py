"""What a count says about a probability."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """`count` of `total`, with its exact 95 % interval."""

    count: int
    total: int

    @property
    def share(self) -> float:
        return self.count / self.total if self.total else math.nan

    @property
    def low(self) -> float:
        return 0.0 if self.count == 0 else 1 - _bound(self.total - self.count, self.total)

    @property
    def high(self) -> float:
        return _bound(self.count, self.total)

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.count} of {self.total}; {self.low:.1%} to {self.high:.1%})"

    def to_dict(self) -> dict[str, float]:
        return {"count": self.count, "total": self.total, "share": self.share, "low": self.low, "high": self.high}


def _bound(count: int, total: int, alpha: float = 0.025) -> float:
    """The largest probability under which `count` or fewer of `total` is not less likely than `alpha`.

    Clopper and Pearson, The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial, Biometrika
    1934; by bisection.
    """
    if count >= total:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(count, total, middle) > alpha else (low, middle)
    return high


def _at_most(count: int, total: int, probability: float) -> float:
    """Chance of `count` successes or fewer in `total` tries."""
    if not 0 < probability < 1:
        return 1.0 if probability <= 0 or count >= total else 0.0
    log_p, log_q = math.log(probability), math.log1p(-probability)
    return math.fsum(
        math.exp(
            math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) + k * log_p + (total - k) * log_q
        )
        for k in range(count + 1)
    )
