"""A time limit for a series of measurements that take longer and longer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Budget:
    """A time limit. `allows` says before each step whether another step of its kind still fits.

    Args:
        seconds: the limit.
        progress: called with the name of every step.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        seconds: float,
        progress: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._progress = progress or (lambda step: None)
        self._end = clock() + seconds
        self._last_s = 0.0

    def left_s(self) -> float:
        return self._end - self._clock()

    def allows(self, growth: float) -> bool:
        """Return whether a step `growth` times as long as the last one fits."""
        return self.left_s() > self._last_s * growth

    def part(self, share: float) -> Budget:
        """Return a budget over a share of the time that is left, for steps of another kind."""
        return Budget(self.left_s() * share, self._progress, self._clock)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._progress(name)
        start = self._clock()
        yield
        self._last_s = self._clock() - start
