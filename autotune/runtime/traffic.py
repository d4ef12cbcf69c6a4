"""Live requests go first: a measured step runs only while no request does, and a request waits for at most one step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..machine import forking
from ..machine.ending import Cancelled


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
        self._measuring: int | None = None  # identifier of the thread that measures
        self._waited_s = 0.0
        self.cancelled = False
        forking.tell(self)

    def after_fork(self) -> None:
        self._requests = 0
        self._measuring = None

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
        """Enclose a measured step. It waits until no request is in flight.

        Raises:
            Cancelled: tuning was cancelled.
        """
        own, start = threading.get_ident(), time.perf_counter()
        with self._changed:
            nested = self._measuring == own
            self._changed.wait_for(
                lambda: nested or self.cancelled or (self._requests == 0 and self._measuring is None)
            )
            if self.cancelled:
                raise Cancelled
            self._measuring = own
        self._waited_s += time.perf_counter() - start
        try:
            yield
        finally:
            if not nested:
                with self._changed:
                    self._measuring = None
                    self._changed.notify_all()

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
