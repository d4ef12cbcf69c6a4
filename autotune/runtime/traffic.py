"""Live requests go first: a measured step runs only while no request does, and a request waits for at most one step.

A moment without requests may never come. Where requests share an engine that can be paused, a measured step then runs
between two of the engine's steps, for a small share of the time. A step that moves weights needs that moment: after a
while, new requests wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from ..errors import StateError
from ..machine import forking
from ..machine.ending import Cancelled
from .batching.terms import await_turn

PATIENCE_S = 5.0  # seconds for which a step waits for a moment without requests, before it pauses or holds up requests
SHARE = 0.1  # of the time for which requests may be paused, at most
HELD_S = 60.0  # seconds for which a new request is held up at most: one under way may wait for it in another thread
WITHIN = "this was asked for within a call of the model, which would wait for itself; do it after the call"

Pause = Callable[[], AbstractContextManager[object]]  # requests rest while its context is held


class Visit:
    """One live request.

    Attributes:
        is_over: whether it has ended.
    """

    def __init__(self, traffic: Traffic, number: int, others: bool) -> None:
        self.traffic = traffic
        self._number = number
        self._others = others
        self.is_over = False

    def is_crowded(self) -> bool:
        """Whether another request has been in flight at any time since it began."""
        return self._others or self.traffic.begun != self._number


# The requests that the running code is a part of. An engine's thread calls a caller's objects in the caller's context.
_VISITS: ContextVar[tuple[Visit, ...]] = ContextVar("autotune_visits", default=())


class Traffic:
    """A lock that requests share and a measured step holds alone.

    `clock` stops while a measured step waits for its turn, so that waiting is not timed as work.
    """

    def __init__(self) -> None:
        self._changed = forking.free(threading.Condition())
        self._requests = 0
        self.begun = 0  # number of live requests so far
        self._has_step = False  # whether a thread measures, or is about to
        self._held_up_by: set[int] = set()  # identifiers of threads that wait for a step, for which new requests wait
        self._measuring: int | None = None  # identifier of the thread that measures, for which requests wait
        self._waited_s = 0.0
        self._pausing: Callable[[], Pause | None] = lambda: None
        self._rested_s = 0.0  # when requests may be paused again, by time.perf_counter
        self.cancelled = False
        forking.tell(self)

    def after_fork(self) -> None:
        self._requests = 0
        self._has_step, self._measuring = False, None
        self._held_up_by.clear()

    def is_inside(self) -> bool:
        """Whether the running code is a part of a live request: a logits processor's, for one."""
        return any(visit.traffic is self and not visit.is_over for visit in _VISITS.get())

    @contextmanager
    def request(self) -> Iterator[Visit]:
        """Enclose a live request. It waits for a step in progress, and for one that has waited long and cannot pause.

        A request within another one waits for a step in progress only: the outer one must end before a step begins. So
        does one that an engine makes for a caller who has left: its turn must end before a step begins.

        Raises:
            RequestError: the terms on which the thread serves a request were violated while this waited.
        """
        own, outer = threading.get_ident(), _VISITS.get()
        with self._changed:
            if self._measuring != own and not any(visit.traffic is self for visit in outer):
                await_turn(self._changed, lambda: not self._held_up_by, HELD_S)
            self._requests += 1  # counted before it waits, so that no further step starts meanwhile
            self.begun += 1
            visit = Visit(self, self.begun, self._requests > 1)
        try:
            _VISITS.set((*outer, visit))
            with self._changed:
                await_turn(self._changed, lambda: self._measuring in (None, own))
            yield visit
        finally:
            visit.is_over = True
            _VISITS.set(outer)
            with self._changed:
                self._requests = max(0, self._requests - 1)  # it is 0 already if the process forked during the request
                self._changed.notify_all()

    @contextmanager
    def step(self, *, pauses: bool = True, resting: Pause = nullcontext) -> Iterator[None]:
        """Enclose a measured step. It waits until no request is in flight, or pauses them.

        Args:
            pauses: whether requests in flight may be paused; if not, it begins only when there is none.
            resting: its context is held during a step that pauses no request, so that what is left of requests that
                were given up rests, too.

        Raises:
            Cancelled: tuning was cancelled.
            StateError: it would wait for the request that it is a part of.
        """
        own, start = threading.get_ident(), time.perf_counter()
        if self._measuring == own:  # a step within a step
            if self.cancelled:
                raise Cancelled
            yield
            return
        try:
            while True:
                with self._turn(start, pauses, resting) as has_begun:
                    if has_begun:
                        yield
                        return
        finally:
            with self._changed:
                self._held_up_by.discard(own)
                self._changed.notify_all()

    @contextmanager
    def _turn(self, start: float, pauses: bool, resting: Pause) -> Iterator[bool]:
        """Enclose a step's turn. Yields whether the step has begun; if not, a request came meanwhile."""
        pause, begun = self._enter(start, pauses), start
        try:
            with (pause or resting)():  # until then requests go on: what is to rest may make some
                has_begun = self._begin(pause is None)
                begun = time.perf_counter()
                if has_begun:
                    self._waited_s += begun - start
                yield has_begun
        finally:
            with self._changed:
                self._has_step, self._measuring = False, None
                if pause is not None:
                    now = time.perf_counter()
                    self._rested_s = now + (now - begun) * (1 / SHARE - 1)
                self._changed.notify_all()

    def _enter(self, start: float, pauses: bool) -> Pause | None:
        """Wait for a step's turn, and take it. Returns what pauses the requests in flight; None if there are none."""
        own = threading.get_ident()
        with self._changed:
            while not self.cancelled:
                if not pauses and self.is_inside():  # before it waits for another step, which may wait for this call
                    raise StateError(WITHIN)
                if self._has_step:
                    self._changed.wait()
                    continue
                if self._requests == 0:
                    self._has_step = True
                    if not pauses:
                        self._held_up_by.add(own)
                    return None
                pause = self._pausing() if pauses else None
                if pause is None and self.is_inside():
                    raise StateError(WITHIN)
                left_s = max(start + PATIENCE_S, self._rested_s if pauses else start) - time.perf_counter()
                is_due = left_s <= 0
                if is_due and pause is not None:
                    self._has_step = True
                    return pause
                if is_due and not pauses:
                    self._held_up_by.add(own)
                self._changed.wait(None if is_due or (pauses and pause is None) else left_s)
            raise Cancelled

    def _begin(self, is_alone: bool) -> bool:
        """Begin the step that has its turn. Returns False if it is to run alone and a request has come.

        Raises:
            Cancelled: tuning was cancelled.
        """
        with self._changed:
            if self.cancelled:
                raise Cancelled
            if is_alone and self._requests:
                return False
            self._measuring = threading.get_ident()
            self._held_up_by.discard(self._measuring)  # new requests wait for the step itself now
            self._changed.notify_all()
            return True

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

    def settle(self) -> None:
        """Wait for the step in progress, after which none begins: tuning was cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._measuring in (None, threading.get_ident()))

    def resume(self) -> None:
        """Let steps begin again after `cancel`."""
        self.cancelled = False

    def clock(self) -> float:
        """Seconds, without the time that measured steps waited for their turn."""
        return time.perf_counter() - self._waited_s
