"""On which terms a request is served: how urgent it is, until when, and whether it is still wanted."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...errors import CancelledRequestError, DeadlineError, RequestError

if TYPE_CHECKING:
    from ...model.seam import Sampling

MOST_WAITING = 256  # requests that may wait in one place, for a row or for their turn; further ones are refused
LOOK_S = 0.1  # who waits looks at the terms of requests so often
AHEAD_S = 1.0  # a request goes before those that came up to so many seconds earlier, for each step of priority


@dataclass(eq=False)
class RequestTerms:
    """The terms of one request.

    Args:
        priority: a larger number goes first. Each step counts like `AHEAD_S` seconds of waiting, so that no request
            waits for ever, whatever comes after it.
        deadline_s: seconds from its arrival after which nobody wants the answer; None means no such limit.
        seed: draws its tokens where they are sampled; None means that the process's random numbers do.
        arrived_s: when it came, by `time.monotonic`.
        cancelled: whether the caller has cancelled it.
        begun_s: when its prompt began to be computed, by `time.monotonic`; None: not yet.
    """

    priority: int = 0
    deadline_s: float | None = None
    seed: int | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    begun_s: float | None = None

    @property
    def order(self) -> float:
        """Requests are served in ascending order of this number."""
        return self.arrived_s - AHEAD_S * self.priority

    def violated(self, now_s: float, tokens: int = 0) -> RequestError | None:
        """Why the request must not be served any longer, or None.

        Args:
            now_s: the time, by `time.monotonic`.
            tokens: new tokens so far, for the message.
        """
        if self.cancelled:
            return CancelledRequestError("the request was cancelled")
        if self.deadline_s is None or self.arrived_s + self.deadline_s > now_s:
            return None
        got = f"after {tokens} new tokens" if tokens else "before its first token"
        return DeadlineError(f"the deadline of {self.deadline_s:g} s passed {got}; give more time, or ask for less")


# The terms of the request that a thread serves.
CURRENT: ContextVar[RequestTerms | None] = ContextVar("autotune_terms", default=None)


def seeded(call: Sampling) -> Sampling:
    """The same call, drawn by the seed in the terms of the request that the thread serves, if they have one."""
    terms = CURRENT.get()
    return call if terms is None or terms.seed is None else call.seeded(terms.seed)


def await_turn(changed: threading.Condition, may_go_on: Callable[[], bool], most_s: float = math.inf) -> None:
    """Wait until a request may go on, for `most_s` seconds at most.

    Args:
        changed: is notified of what may let it go on; its lock is held.

    Raises:
        RequestError: the terms on which the thread serves a request were violated meanwhile.
    """
    terms, end_s = CURRENT.get(), time.monotonic() + most_s
    while not may_go_on() and (now_s := time.monotonic()) < end_s:
        if terms is not None and (error := terms.violated(now_s)) is not None:
            raise error
        left_s = min(end_s - now_s, math.inf if terms is None else LOOK_S)
        changed.wait(left_s if math.isfinite(left_s) else None)
