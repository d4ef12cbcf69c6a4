"""The budget of a tune while it is spent: what is left, what work took, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import BudgetSpentError
from ..report.progress import Doing
from ..validate.latency import STEADY_REQUESTS
from ..validate.ratios import FEWEST_PAIRS

RACE_S, LEAST_RACE_S = 60.0, 5.0  # seconds of a race if all pairs are needed, and the least if little budget is left
RACE_SHARE = 0.25  # of the budget that is left: what a race may take beyond RACE_S, if its answer is not clear
GRACE, GRACE_S = 0.08, 12.0  # overrun for work under way: share of the budget, seconds; the larger counts


class Allowance:
    """What may still be spent of a budget.

    Args:
        budget_s: seconds in all.
        notify: told what is under way, with the share that is done.
        clock: gives the time, seconds.

    Attributes:
        deadline: value of `clock` after which optional measurements are skipped.
        request_s: seconds of the original's shortest timed request; 0 until it is known.
        took_s: seconds of the latest work of each kind.
    """

    def __init__(
        self, budget_s: float, notify: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget_s = budget_s
        self.notify = notify
        self.clock = clock
        self.deadline = math.inf
        self.request_s = 0.0
        self.took_s = dict[str, float]()

    def begin(self, budget_s: float, deadline: float) -> None:
        """Begin to spend a budget that ends at `deadline`."""
        self.budget_s, self.deadline = budget_s, deadline

    @property
    def left_s(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self.deadline - self.clock()

    @property
    def grace_s(self) -> float:
        """Seconds by which work under way may overrun."""
        return max(GRACE_S, GRACE * self.budget_s)

    @property
    def race_s(self) -> float:
        """Least seconds of a race: the original's part of warm-up and of the fewest pairs, over few tokens."""
        return (STEADY_REQUESTS + FEWEST_PAIRS) * self.request_s

    @property
    def shortage(self) -> str | None:
        """Why there is no time to confirm in full, which takes as long as choosing did; None if there is."""
        left_s, needed_s = self.left_s, sum(self.took_s.values())
        if needed_s <= left_s + self.grace_s:
            return None
        return f"in full takes about {needed_s:.0f} s, {max(left_s, 0):.0f} s are left"

    def longest_race_s(self, kept_s: float) -> float:
        """Seconds that a race may take if its answer is not clear.

        Args:
            kept_s: seconds of the budget that are left to what follows.
        """
        left_s = self.left_s
        most_s = max(RACE_S, RACE_SHARE * min(left_s, self.budget_s))
        return max(LEAST_RACE_S, min(most_s, left_s - kept_s))

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Note how long the body took."""
        start = self.clock()
        yield
        self.took_s[kind] = self.clock() - start

    def doing(self, what: str) -> Callable[[str, float], None]:
        """A progress callback."""
        return lambda step, share: self.notify(Doing(what, share))

    def in_time(self, what: str) -> Callable[[str, float], None]:
        """A progress callback that stops the work when a race after it could not end within the budget and its grace.

        It raises BudgetSpentError.
        """
        doing = self.doing(what)

        def tell(step: str, share: float) -> None:
            if -self.left_s > max(0.0, self.grace_s - self.race_s):
                budget = f"the budget of {self.budget_s:.0f} s"
                raise BudgetSpentError(f"{budget} was spent with {share:.0%} done of {what}")
            doing(step, share)

        return tell
