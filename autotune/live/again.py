"""What noise hid is tried again later, by itself.

A search in the background that kept the original may have done so only because the machine was busy, or because no gain
could be told from noise. At a quieter time it may come to something else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from weakref import WeakMethod

from ..machine import forking
from ..report.numbers import duration

if TYPE_CHECKING:
    from ..workload import Workload

# Seconds of rest before each further search. After ten minutes a build or a back-up is over; a machine that is busy for
# more than an hour is busy for good, and each search is itself load for whoever else is there.
PAUSES_S = (600.0, 1200.0, 2400.0)

Tune = Callable[["Workload", bool], bool]


class Rest(Protocol):
    """Waits for some seconds. Returns whether all was called off, as soon as it is."""

    def __call__(self, seconds: float) -> bool: ...


class Again:
    """The rests between searches for one model.

    Args:
        rest: waits.
        clock: monotonic seconds.
    """

    def __init__(self, rest: Rest, clock: Callable[[], float] = time.monotonic) -> None:
        self._rest, self._clock = rest, clock
        self._due_s: float | None = None  # value of the clock; None while nothing is to be tried again
        forking.tell(self)

    def after_fork(self) -> None:
        """The thread that would try again is the parent's."""
        self._due_s = None

    def drop(self) -> None:
        """Do not try again: someone else does."""
        self._due_s = None

    def keep_trying(self, tune: WeakMethod[Tune], work: Workload) -> None:
        """Tune until noise has hidden nothing, or it was tried often enough.

        Args:
            tune: of what is tuned, which may be gone when a rest is over. Told whether it is another try; returns
                whether noise may have hidden a gain.
            work: what to tune for.
        """
        if not _tune(tune, work, False):
            return
        for pause_s in PAUSES_S:
            self._due_s = self._clock() + pause_s
            called_off = self._rest(pause_s)
            due, self._due_s = self._due_s is not None, None
            if called_off or not due or not _tune(tune, work, True):
                return

    def said(self, detail: str) -> str:
        """What became of a search, in words, with when it is repeated."""
        due_s = self._due_s
        if due_s is None:
            return detail
        left = duration(max(0.0, due_s - self._clock()))
        return f"{detail.replace('kept the original', 'kept the original for now', 1)}; tried again in {left}"


def _tune(tune: WeakMethod[Tune], work: Workload, again: bool) -> bool:
    """In a frame of its own: nothing holds on to what is tuned during a rest."""
    method = tune()
    return method is not None and method(work, again)
