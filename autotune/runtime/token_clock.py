"""A clock for the tokens of a live answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def never_waits(streamer: Any) -> bool:
    """Whether a streamer may be called in any thread: it waits for nothing, and runs nothing of the caller's.

    So an engine need not wake the caller's thread for each token.
    """
    return bool(getattr(streamer, "never_waits", False))


class TokenClock:
    """A streamer that passes tokens to the caller's, and records when the first and the latest token arrived.

    Args:
        streamer: the caller's streamer, or None.
        clock: monotonic seconds.

    Attributes:
        tokens: number of tokens of the answer so far.
    """

    def __init__(self, streamer: Any, clock: Callable[[], float]) -> None:
        self._streamer = streamer
        self._clock = clock
        self.never_waits = streamer is None or never_waits(streamer)
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
        """Time to the first token of a call that began at `start_s`; NaN before the first token."""
        return self._first_s - start_s

    @property
    def tpot_s(self) -> float:
        """Time per token after the first token; NaN before the second."""
        return (self._latest_s - self._first_s) / (self.tokens - 1) if self.tokens > 1 else math.nan
