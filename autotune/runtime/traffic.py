"""Live requests go first: a measured step runs only while no request does, and a request waits for at most one step.

Where requests share an engine that can be paused, a step need not wait for a moment without requests, which may never
come: after a while it runs between two of the engine's steps, for a small share of the time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from ..machine import forking
from ..machine.ending import Cancelled

PATIENCE_S = 5.0  # seconds for which a step waits for a moment without requests, before it pauses them
SHARE = 0.1  # of the time for which requests may be paused, at most

Pause = Callable[[], AbstractContextManager[object]]  # requests rest while its context is held


class Visit:
    """One live request under way."""

    def __init__(self, traffic: Traffic, number: int, others: bool) -> None:
        self._traffic = traffic
        self._number = number
        self._others = others

    def is_crowded(self) -> bool:
        """Whether another request has been in flight at any time since it began."""
        return self._others or self._traffic.begun != self._number


class Traffic:
    """A lock that requests share and a measured step holds alone.

    `clock` stops while a measured step waits for its turn, so that waiting is not timed as work.
    """

    def __init__(self) -> None:
        self._changed = forking.free(threading.Condition())
        self._requests = 0
        self.begun = 0  # number of live requests so far
        self._has_step = False  # whether a thread measures, or is about to
        self._measuring: int | None = None  # identifier of the thread that measures, for which requests wait
        self._waited_s = 0.0
        self._pausing: Callable[[], Pause | None] = lambda: None
        self._rested_s = 0.0  # when requests may be paused again, by time.perf_counter
        self.cancelled = False
        forking.tell(self)

    def after_fork(self) -> None:
        self._requests = 0
        self._has_step, self._measuring = False, None

    @contextmanager
    def request(self) -> Iterator[Visit]:
        """Enclose a live request. It waits only for a measured step in progress."""
        own = threading.get_ident()
        with self._changed:
            self._requests += 1  # counted before it waits, so that no further step starts meanwhile
            self.begun += 1
            visit = Visit(self, self.begun, self._requests > 1)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._measuring in (None, own))
            yield visit
        finally:
            with self._changed:
                self._requests = max(0, self._requests - 1)  # it is 0 already if the process forked during the request
                self._changed.notify_all()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enclose a measured step. It waits until no request is in flight, or pauses them.

        Raises:
            Cancelled: tuning was cancelled.
        """
        if self._measuring == threading.get_ident():  # a step within a step
            if self.cancelled:
                raise Cancelled
            yield
            return
        begun = start = time.perf_counter()
        pause = self._enter(start)
        try:
            with ExitStack() as paused:
                if pause is not None:
                    paused.enter_context(pause())  # until then requests go on: what is to be paused may make some
                with self._changed:
                    self._measuring = threading.get_ident()
                begun = time.perf_counter()
                self._waited_s += begun - start
                yield
        finally:
            with self._changed:
                self._has_step, self._measuring = False, None
                if pause is not None:
                    now = time.perf_counter()
                    self._rested_s = now + (now - begun) * (1 / SHARE - 1)
                self._changed.notify_all()

    def _enter(self, start: float) -> Pause | None:
        """Wait for a step's turn, and take it. Returns what pauses the requests in flight; None if there are none."""
        with self._changed:
            while not self.cancelled:
                if not self._has_step:
                    if self._requests == 0:
                        self._has_step, self._measuring = True, threading.get_ident()
                        return None
                    left_s, pause = max(start + PATIENCE_S, self._rested_s) - time.perf_counter(), self._pausing()
                    if pause is not None and left_s <= 0:
                        self._has_step = True
                        return pause
                    self._changed.wait(None if pause is None else left_s)
                else:
                    self._changed.wait()
            raise Cancelled

    def pause_by(self, pausing: Callable[[], Pause | None]) -> None:
        """Set a function that returns what pauses the requests in flight now; None if nothing does."""
        self._pausing = pausing

    def rest(self, seconds: float) -> bool:
        """Wait. Returns whether tuning was cancelled; a cancellation ends the wait."""
        with self._changed:
            self._changed.wait_for(lambda: self.cancelled, seconds)
            return self.cancelled

    def cancel(self) -> None:
        with self._changed:
            self.cancelled = True
            self._changed.notify_all()

    def clock(self) -> float:
        """Seconds, without the time that measured steps waited for their turn."""
        return time.perf_counter() - self._waited_s
