"""Times per token of calls: whether the plan's became longer, and whether the original's did, too."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from .drift import LatencyCusum, Shape, paces_at_commit, shape_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...runtime.token_clock import TokenClock
    from ...validate import Latency

FEWEST_TOKENS = 8  # least tokens of a call for its time per token to count
OTHERS = 3  # calls of the original needed to see whether it is faster than a plan that became slow


class Paces:
    """Times per token of calls, by shape, while a plan serves and after it became slow.

    Args:
        latency: what was measured at commit; None: the first calls of a shape set its expected time.
    """

    def __init__(self, latency: Latency | None) -> None:
        expected_s, self.originals_s = paces_at_commit(latency)
        self.plan = {shape: LatencyCusum(seconds) for shape, seconds in expected_s.items()}
        self._slow: tuple[Shape, float] = ((0, 0), 0.0)  # shape and time per token that took the plan out
        self._others_s: list[float] = []  # of the original's calls of that shape since

    def begin_again(self) -> None:
        """Forget how long calls took; what is expected stays."""
        self.plan = {shape: LatencyCusum(pace.expected_s) for shape, pace in self.plan.items()}

    def slowed(self, size: Sequence[int], tokens: TokenClock) -> dict[str, float]:
        """Note a call of the plan. Returns the numbers that show that calls became slower, or none.

        The numbers have what the original took at commit, if it is known and was longer: then the original would be no
        better, and from now on calls are expected to take as long as they do.

        Args:
            size: batch and tokens of the prompt.
            tokens: when its tokens came.
        """
        if tokens.tokens < FEWEST_TOKENS or tokens.tpot_s <= 0:
            return {}
        shape = shape_of(*size)
        pace = self.plan[shape] = self.plan.get(shape, LatencyCusum()).after(tokens.tpot_s)
        if not pace.alarmed or pace.expected_s is None:
            return {}
        numbers = {"ms per token": 1e3 * tokens.tpot_s, "expected": 1e3 * pace.expected_s}
        if tokens.tpot_s < self.originals_s.get(shape, 0.0):
            self.plan[shape] = LatencyCusum(tokens.tpot_s)
            return numbers | {"original": 1e3 * self.originals_s[shape]}
        self.plan[shape] = LatencyCusum(pace.expected_s)
        self._slow = (shape, tokens.tpot_s)
        self._others_s = []
        return numbers

    def is_like_slow(self, size: Sequence[int]) -> bool:
        """Whether a call has the shape of those that became slow.

        Args:
            size: batch and tokens of the prompt.
        """
        return self._slow[0] == shape_of(*size)

    def acquitted(self, tokens: TokenClock) -> dict[str, float]:
        """Note a call of the original of that shape. Returns the numbers that show that it is no faster, or none."""
        shape, slow_s = self._slow
        if tokens.tokens >= FEWEST_TOKENS:
            self._others_s.append(tokens.tpot_s)
        if len(self._others_s) < OTHERS or median(self._others_s) < slow_s:
            return {}
        self.plan[shape] = LatencyCusum(slow_s)
        return {"ms per token": 1e3 * slow_s, "original": 1e3 * median(self._others_s)}
