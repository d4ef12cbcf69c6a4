"""Repeats a background search later if noise may have hidden a gain.

A background search may keep the original only because the machine was busy, or because a gain could not be told from
noise. At a quieter time it may find a plan.
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

# Pauses before the further searches, seconds. A build or a backup is usually over after ten minutes. A machine that is
# busy for more than an hour probably stays busy, and each search adds load for its other users.
PAUSES_S = (600.0, 1200.0, 2400.0)

Tune = Callable[["Workload", bool], bool]


class Rest(Protocol):
    """Wait for `seconds`, or until tuning is called off. Returns whether it was called off."""

    def __call__(self, seconds: float) -> bool: ...


class Again:
    """The pauses between searches for one model.

    Args:
        rest: waits between two searches.
        clock: returns monotonic seconds.
    """

    def __init__(self, rest: Rest, clock: Callable[[], float] = time.monotonic) -> None:
        self._rest = rest
        self._clock = clock
        self._due_s: float | None = None  # clock value of the next search; None if no search is due
        forking.tell(self)

    def after_fork(self) -> None:
        """Forget the next search in a forked child: the thread that would run it exists only in the parent."""
        self._due_s = None

    def drop(self) -> None:
        """Cancel the next search, because its owner tunes now."""
        self._due_s = None

    def keep_trying(self, tune: WeakMethod[Tune], work: Workload) -> None:
        """Tune until noise no longer hides a gain, or until all pauses are used up.

        Args:
            tune: method of the tuned object, which may no longer exist after a pause. Takes the workload and whether
                this is a repeated try; returns whether noise may have hidden a gain.
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
        """Return `detail`, the outcome of a search, with the time until the next search if one is due."""
        due_s = self._due_s
        if due_s is None:
            return detail
        left = duration(max(0.0, due_s - self._clock()))
        return f"{detail.replace('kept the original', 'kept the original for now', 1)}; tried again in {left}"


def _tune(tune: WeakMethod[Tune], work: Workload, again: bool) -> bool:
    """Call the method if its object still exists. A separate function, so that no reference to it outlives the call."""
    method = tune()
    return method is not None and method(work, again)
