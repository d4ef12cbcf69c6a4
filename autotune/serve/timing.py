"""When the parts of one answer happened."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class AnswerTimes:
    """Moments of one answer in monotonic seconds, and what lies between them in seconds. None: it did not happen.

    Args:
        arrived_s: when its request arrived.
        begun_s: when its prompt began to be computed.
        first_s, last_s: when its first and its latest token came.
        tokens: number of tokens so far.
    """

    arrived_s: float
    begun_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0

    def token(self, now_s: float) -> float:
        """Take a token. Returns the seconds since the one before it; the first, since the arrival."""
        gap_s = now_s - (self.arrived_s if self.last_s is None else self.last_s)
        self.first_s = now_s if self.first_s is None else self.first_s
        self.last_s = now_s
        self.tokens += 1
        return gap_s

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token."""
        return _between(self.arrived_s, self.first_s)

    @property
    def queue_s(self) -> float | None:
        """From arrival to the beginning of its prompt."""
        return _between(self.arrived_s, self.begun_s)

    @property
    def prefill_s(self) -> float | None:
        """From the beginning of its prompt to the first token."""
        return _between(self.begun_s, self.first_s)

    @property
    def decode_s(self) -> float | None:
        """From the first token to the last."""
        return _between(self.first_s, self.last_s)

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first; None with fewer than two."""
        decode_s = self.decode_s
        return decode_s / (self.tokens - 1) if decode_s is not None and self.tokens > 1 else None


def _between(since_s: float | None, until_s: float | None) -> float | None:
    return None if since_s is None or until_s is None else until_s - since_s
