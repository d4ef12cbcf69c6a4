"""When the tokens of a live answer come."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class TokenClock:
    """The caller's streamer, which also notes when the first and the latest token came.

    Args:
        streamer: the caller's, or None.
        clock: monotonic seconds.

    Attributes:
        tokens: of the answer so far.
    """

    def __init__(self, streamer: Any, clock: Callable[[], float]) -> None:
        self._streamer, self._clock = streamer, clock
        self.tokens = 0
        self._first_s = self._latest_s = math.nan

    def put(self, value: Any) -> None:
        self._latest_s = self._clock()
        self._first_s = self._latest_s if self.tokens == 0 else self._first_s
        self.tokens += 1
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()

    def ttft_s(self, start_s: float) -> float:
        """Time to the first token of a call that began at `start_s`; NaN before it."""
        return self._first_s - start_s

    @property
    def tpot_s(self) -> float:
        """Time per token after the first; NaN before the second."""
        return (self._latest_s - self._first_s) / (self.tokens - 1) if self.tokens > 1 else math.nan
