"""Times per token of calls: whether the plan's became longer, and whether the original's did, too."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from .drift import LatencyCusum, Shape, paces_at_commit, shape_of

if TYPE_CHECKING:
    from ...model.seam import Sampling
    from ...runtime.token_clock import TokenClock
    from ...validate import Latency

FEWEST_TOKENS = 8  # least tokens of a call for its time per token to count
OTHERS = 3  # calls of the original needed to see whether it is faster than a plan that became slow


class Kind(NamedTuple):
    """Calls with comparable times per token.

    Args:
        shape: as `shape_of` has it.
        processes: whether tokens are drawn, or scores pass processors: that takes its own time, whatever serves.
    """

    shape: Shape
    processes: bool

    @classmethod
    def of(cls, call: Sampling) -> Kind:
        return cls(shape_of(*call.input_ids.shape), call.settings.do_sample or call.scoring() is not None)


class Paces:
    """Times per token of calls, by kind, while a plan serves and after it became slow.

    Args:
        latency: what was measured at commit, without processors; the first calls of another kind set its expected time.
    """

    def __init__(self, latency: Latency | None) -> None:
        expected_s, self.originals_s = paces_at_commit(latency)
        self.plan = {Kind(shape, processes=False): LatencyCusum(seconds) for shape, seconds in expected_s.items()}
        self._slow: tuple[Kind | None, float] = (None, 0.0)  # kind and time per token that took the plan out
        self._others_s: list[float] = []  # of the original's calls of that kind since

    def begin_again(self) -> None:
        """Forget how long calls took; what is expected stays."""
        self.plan = {kind: LatencyCusum(pace.expected_s) for kind, pace in self.plan.items()}

    def slowed(self, kind: Kind, tokens: TokenClock) -> dict[str, float]:
        """Note a call of the plan. Returns the numbers that show that calls became slower, or none.

        The numbers have what the original took at commit, if it is known and was longer: then the original would be no
        better, and from now on calls are expected to take as long as they do.

        Args:
            kind: the call's.
            tokens: when its tokens came.
        """
        if tokens.tokens < FEWEST_TOKENS or tokens.tpot_s <= 0:
            return {}
        pace = self.plan[kind] = self.plan.get(kind, LatencyCusum()).after(tokens.tpot_s)
        if not pace.alarmed or pace.expected_s is None:
            return {}
        numbers = {"ms per token": 1e3 * tokens.tpot_s, "expected": 1e3 * pace.expected_s}
        if tokens.tpot_s < (original_s := self._original_s(kind.shape)):
            self.plan[kind] = LatencyCusum(tokens.tpot_s)
            return numbers | {"original": 1e3 * original_s}
        self.plan[kind] = LatencyCusum(pace.expected_s)
        self._slow = (kind, tokens.tpot_s)
        self._others_s = []
        return numbers

    def _original_s(self, shape: Shape) -> float:
        """What the original's tokens took at commit: after such prompts, else in such batches at least; 0: unknown."""
        batch, _ = shape
        alike = [seconds for (size, _), seconds in self.originals_s.items() if size == batch]
        return self.originals_s.get(shape, min(alike, default=0.0))

    def is_like_slow(self, kind: Kind) -> bool:
        """Whether a call is of the kind of those that became slow."""
        return self._slow[0] == kind

    def acquitted(self, tokens: TokenClock) -> dict[str, float]:
        """Note a call of the original of that kind. Returns the numbers that show that it is no faster, or none."""
        kind, slow_s = self._slow
        if tokens.tokens >= FEWEST_TOKENS:
            self._others_s.append(tokens.tpot_s)
        if kind is None or len(self._others_s) < OTHERS or median(self._others_s) < slow_s:
            return {}
        self.plan[kind] = LatencyCusum(slow_s)
        return {"ms per token": 1e3 * slow_s, "original": 1e3 * median(self._others_s)}
