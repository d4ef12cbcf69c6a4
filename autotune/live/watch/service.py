"""After commit: is the plan in service?

A problem opens a circuit breaker. Every transition of the breaker is an event. A batch size that could not be prepared
for has a breaker to itself.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ...machine import forking
from ...tune import store
from .breaker import Breaker, BreakerEvent, BreakerState, Cause, Event, Rules
from .drift import describe

if TYPE_CHECKING:
    from ...model.seam import Sampling
    from ...runtime.variant import Variant
    from ...tune.plan import Plan

log = logging.getLogger("autotune")

KEPT_EVENTS = 100  # latest events that are kept


class PlanService(ABC):
    """Decides whether the committed plan may serve, call by call.

    Args:
        rules: limits of the breaker.
        clock: returns monotonic seconds.
        changed: called with the event of every transition.

    Attributes:
        breaker: whether the plan may serve.
        cause: why it was taken out of service, if it was.
        events: the latest transitions, and what else was recorded.
    """

    def __init__(self, rules: Rules, clock: Callable[[], float], changed: Callable[[Event], None]) -> None:
        self.rules = rules
        self.clock = clock
        self.changed = changed
        self.events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._lock = forking.free(threading.RLock())
        self._enter(None, None)
        forking.tell(self)

    def _enter(self, variant: Variant | None, plan: Plan | None, *, stored: bool = False) -> None:
        """Put a plan into service. Forgets everything about the previous one. The lock is held.

        Args:
            stored: whether the plan is in the store, where its failures are then recorded.
        """
        self._variant = variant
        self._plan = plan
        self._stored = stored
        self._trial: int | None = None  # id of the thread that tries a plan again
        self.breaker = Breaker(since_s=self.clock())
        self.cause = Cause.FAILURE
        self._batches: dict[int, Breaker] = {}  # batch size -> breaker of a size that could not be prepared

    @abstractmethod
    def _work_when_idle(self) -> None:
        """Try a plan whose answers were at fault again, when no request is in flight."""

    def after_fork(self) -> None:
        """Give up the trials of the parent's threads, which nobody ends in a forked child."""
        now, event = self.clock(), BreakerEvent.ABANDONED
        self._trial = None
        self.breaker = self.breaker.after(event, now, self.rules)
        self._batches = {size: each.after(event, now, self.rules) for size, each in self._batches.items()}

    def admits(self, batch: int) -> bool:
        """Whether the plan may serve this call. After the pause of an open breaker, one call at a time may try.

        Args:
            batch: number of the call's sequences.
        """
        with self._lock:
            now, known = self.clock(), self._batches.get(batch, Breaker())
            if known.phase is not BreakerState.CLOSED and not known.due(now):
                return False
            if self.breaker.phase is not BreakerState.CLOSED:
                if not self.breaker.due(now):
                    return False
                if self.cause.is_of_answers:
                    self._work_when_idle()
                    return False
                self._step(BreakerEvent.ASKED, "one call tries the plan again")
            if batch in self._batches:
                self._batches[batch] = known.after(BreakerEvent.ASKED, now, self.rules)
            return True

    def open(self) -> bool:
        """Whether the plan is out of service for calls that cannot be a trial."""
        return self.breaker.phase is not BreakerState.CLOSED

    @property
    def is_slow(self) -> bool:
        """Whether the plan is out of service because its calls took longer, which may be the machine's fault."""
        return self.open() and self.cause is Cause.LATENCY

    def failed(
        self,
        reason: str,
        cause: Cause = Cause.FAILURE,
        numbers: Mapping[str, float] | None = None,
        call: Sampling | None = None,
        variant: Variant | None = None,
    ) -> None:
        """Take a plan that failed out of service, for a while or permanently.

        Args:
            call: the one that failed; a trial of its batch size has shown nothing then.
            variant: what failed. Nothing happens if another one serves by now. None: the one that serves.
        """
        with self._lock:
            if variant not in (None, self._variant):
                return
            if call is not None:
                self._note_batch(call, BreakerEvent.ABANDONED)
            if self._counts():  # else a call from before it opened would say why it did
                self.cause = cause
            self._step(BreakerEvent.FAILED, reason, numbers or {})

    def unready(self, call: Sampling, variant: Variant | None) -> None:
        """Keep calls of this batch size from the plan, for a while or permanently: it could not be prepared for them.

        Calls of other batch sizes are still served.

        Args:
            variant: what was to serve the call. Nothing happens if another one serves by now.
        """
        with self._lock:
            if variant is not self._variant:
                return
            self._batches.setdefault(call.input_ids.shape[0], Breaker(since_s=self.clock()))
            self._note_batch(call, BreakerEvent.FAILED)
            self._step(BreakerEvent.ABANDONED, "the trial call could not be prepared for")

    def abandoned(self, variant: Variant, call: Sampling | None = None) -> None:
        """Record that the caller ended a call of a variant early, which says nothing about the plan."""
        with self._lock:
            if variant is not self._variant:
                return
            if call is not None:
                self._note_batch(call, BreakerEvent.ABANDONED)
            self._step(BreakerEvent.ABANDONED, "the trial call was given up by its caller")

    # What follows

    def _note_batch(self, call: Sampling, event: BreakerEvent) -> None:
        batch = call.input_ids.shape[0]
        if (known := self._batches.get(batch)) is not None:
            self._batches[batch] = known.after(event, self.clock(), self.rules)

    def _counts(self) -> bool:
        """Whether a failure in this thread opens the breaker."""
        phase = self.breaker.phase
        return phase is BreakerState.CLOSED or (phase is BreakerState.HALF_OPEN and self._is_trial())

    def _is_trial(self) -> bool:
        return threading.get_ident() == self._trial

    def _step(self, event: BreakerEvent, reason: str, numbers: Mapping[str, float] | None = None) -> None:
        before, now = self.breaker, self.clock()
        if before.phase is BreakerState.HALF_OPEN and not self._is_trial():
            return  # a call from before it opened says nothing about the trial
        self.breaker = after = before.after(event, now, self.rules)
        if after.phase == before.phase:
            return
        self._trial = threading.get_ident() if after.phase is BreakerState.HALF_OPEN else None
        noted = self._record(reason, numbers)
        log.warning("the plan's circuit breaker is %s: %s", after.phase, noted.reason)
        if self._plan is not None and self._stored and after.phase is not BreakerState.HALF_OPEN:
            store.trust(self._plan.fingerprint, None if after.phase is BreakerState.CLOSED else noted.reason)
        self.changed(noted)

    def _record(self, reason: str, numbers: Mapping[str, float] | None) -> Event:
        """Add an event to those that are kept, with the breaker's state since."""
        said = f"{reason} ({describe(numbers)})" if numbers else reason
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.events.append(event := Event(moment, self.breaker.phase, said, dict(numbers or {})))
        return event
