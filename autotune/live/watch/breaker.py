"""When a plan that failed may serve again. Pure: a state and an event give the next state.

    closed --failed--> open --asked, after a pause--> half-open --served--> closed
                                                          ├─────failed--> open, for twice as long
                                                          └──undecided--> open, for as long again
    opened too often in a row: disabled permanently

The pattern is Nygard's circuit breaker (Release It!, 2nd edition 2018, chapter 5). The pause doubles, so that a plan
that keeps failing costs fewer and fewer calls and is disabled in the end.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


class BreakerState(enum.StrEnum):
    """Whether the plan may serve."""

    CLOSED = "closed"  # it serves
    OPEN = "open"  # it does not
    HALF_OPEN = "half-open"  # one call tries it
    DISABLED = "disabled"  # it never serves again


class BreakerEvent(enum.StrEnum):
    """What happened to a call or to the plan."""

    ASKED = "asked"  # a call could be served
    SERVED = "served"  # the trial call was served
    FAILED = "failed"  # the plan failed, while closed or in the trial call
    ABANDONED = "abandoned"  # the caller ended the trial call
    UNDECIDED = "undecided"  # the trial showed nothing
    CLEARED = "cleared"  # the failure was not the plan's fault


class Cause(enum.Enum):
    """Why a plan was taken out of service."""

    FAILURE = enum.auto()  # it raised
    DRIFT = enum.auto()  # its answers differ from the original's
    BROKEN = enum.auto()  # its logits are broken; the original was not there to compare with
    LATENCY = enum.auto()  # it became slower
    RECOMPILING = enum.auto()

    @property
    def is_of_answers(self) -> bool:
        """Whether its answers are at fault. Then the trial scores a kept call again, so no user gets a bad answer."""
        return self in (Cause.DRIFT, Cause.BROKEN)


@dataclass(frozen=True)
class Event:
    """One transition of the circuit breaker.

    Args:
        time: ISO 8601, UTC.
        phase: the breaker's new phase.
        reason: why, in a sentence.
        numbers: the numbers that decided, by name.
    """

    time: str
    phase: BreakerState
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """The limits of a breaker.

    Args:
        pause_s: how long it stays open the first time, seconds.
        longest_s: the longest pause, seconds; the pause doubles each time in a row up to this.
        most_flaps: times in a row it may open; one more disables it.
        steady_s: seconds closed after which earlier openings no longer count.
    """

    pause_s: float = 30.0
    longest_s: float = 3600.0
    most_flaps: int = 4
    steady_s: float = 600.0

    def pause_after_s(self, flaps: int) -> float:
        """How long a breaker stays open that opened for the `flaps`th time in a row, seconds."""
        return min(self.pause_s * 2.0 ** (flaps - 1), self.longest_s)


@dataclass(frozen=True)
class Breaker:
    """Whether a plan may serve.

    Args:
        phase: whether the plan may serve.
        flaps: times in a row the breaker opened.
        since_s: when the phase began, on the caller's clock, seconds.
        pause_s: how long it stays open after `since_s`, seconds.
    """

    phase: BreakerState = BreakerState.CLOSED
    flaps: int = 0
    since_s: float = 0.0
    pause_s: float = 0.0

    def due(self, now_s: float) -> bool:
        """Whether the breaker is open and its pause is over."""
        return self.phase is BreakerState.OPEN and now_s - self.since_s >= self.pause_s

    def after(self, event: BreakerEvent, now_s: float, rules: Rules = Rules()) -> Breaker:
        """Return the state after `event`.

        Args:
            event: what happened.
            now_s: monotonic seconds.
            rules: the limits of the breaker.
        """
        match self.phase, event:
            case BreakerState.OPEN, BreakerEvent.ASKED if self.due(now_s):
                return replace(self, phase=BreakerState.HALF_OPEN, since_s=now_s)
            case ((BreakerState.CLOSED | BreakerState.HALF_OPEN), BreakerEvent.FAILED):
                return self._opened(now_s, rules)
            case BreakerState.HALF_OPEN, BreakerEvent.SERVED:
                return replace(self, phase=BreakerState.CLOSED, since_s=now_s, pause_s=0.0)
            case BreakerState.HALF_OPEN, BreakerEvent.ABANDONED:  # the next call tries the plan
                return replace(self, phase=BreakerState.OPEN, since_s=now_s, pause_s=0.0)
            case BreakerState.HALF_OPEN, BreakerEvent.UNDECIDED:  # the next trial is after the same pause
                return Breaker(BreakerState.OPEN, self.flaps, now_s, rules.pause_after_s(self.flaps))
            case BreakerState.OPEN, BreakerEvent.CLEARED:
                return Breaker(flaps=self.flaps - 1, since_s=now_s)
        return self

    def _opened(self, now_s: float, rules: Rules) -> Breaker:
        steady = self.phase is BreakerState.CLOSED and now_s - self.since_s >= rules.steady_s
        flaps = 1 if steady else self.flaps + 1
        if flaps > rules.most_flaps:
            return Breaker(BreakerState.DISABLED, flaps, now_s)
        return Breaker(BreakerState.OPEN, flaps, now_s, rules.pause_after_s(flaps))
