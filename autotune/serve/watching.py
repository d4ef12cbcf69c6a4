"""What a page shows while a model serves: lines of tuning, and figures once a second to all who watch."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..live.status import State
from ..report.progress import Doing
from .refusal import Refusal

if TYPE_CHECKING:
    from ..live.status import Status
    from ..tune.plan import Plan
    from .metrics import Counts, Percentiles

log = logging.getLogger("autotune.serve")

EVERY_S = 1.0  # seconds between two samples
LATE_S = 3.0  # samples further apart give no rate
PAST = 120  # samples that a page gets when it opens
MOST_WATCHERS = 64  # streams at once
MOST_LINES = 200  # lines of tuning that are kept
NO_SWITCH = (State.TUNING, State.STALE, State.PASSED_THROUGH)  # a plan cannot be committed now
MAY_RETURN = (State.FAILED, State.STALE)  # the plan may serve again by itself
CHARTED = ("t", "tokens_per_s", "running", "waiting", "ttft_ms", "inter_token_ms")  # of a past sample

Sample = dict[str, Any]


@dataclass(frozen=True)
class TuningLine:
    """A step of tuning.

    Args:
        at_s: seconds from the start to when it began.
        text: the step in a phrase.
        share: how much of it is done, from 0 to 1; None if unknown.
    """

    at_s: float
    text: str
    share: float | None = None


class TuningLog:
    """Keeps the latest lines of tuning. Any thread may write."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._lines = deque[TuningLine](maxlen=MOST_LINES)
        self._lock = threading.Lock()
        self.count = 0  # lines so far, also those no longer kept

    def update(self, step: str) -> None:
        """Take a step as a `progress` callback does: a new one, or how much of the latest is done."""
        share = step.share if isinstance(step, Doing) else None
        with self._lock:
            if self._lines and self._lines[-1].text == step:
                self._lines[-1] = TuningLine(self._lines[-1].at_s, str(step), share)
                return
            self._lines.append(TuningLine(self._clock() - self._began_s, str(step), share))
            self.count += 1

    def lines(self) -> tuple[TuningLine, ...]:
        """Return the lines that are kept, the oldest first."""
        with self._lock:
            return tuple(self._lines)


@dataclass(frozen=True)
class Reading:
    """What was read of a server at one moment.

    Args:
        at_s: monotonic seconds.
        status: the model's.
        plan: what tuning found, whether it serves or not; None before.
        lines: number of lines of tuning so far.
        latest: the latest of them.
        running, waiting: requests that are answered, and that wait.
        counts: since the server began.
        first, following: percentiles of the time to the first token, and between two tokens.
    """

    at_s: float
    status: Status
    plan: Plan | None
    lines: int
    latest: TuningLine | None
    running: int
    waiting: int
    counts: Counts
    first: Percentiles | None
    following: Percentiles | None


def figures(reading: Reading, before: Mapping[str, Any] | None) -> Sample:
    """Return one sample as a page gets it.

    Args:
        before: the sample before, for rates; None: there is none.
    """
    status, counts, latest = reading.status, reading.counts, reading.latest
    passed_s = reading.at_s - before["t"] if before else 0.0
    is_near = before is not None and 0 < passed_s <= LATE_S
    return {
        "t": round(reading.at_s, 3),
        "state": str(status.state),
        "detail": status.detail,
        "transforms": list(status.transforms),
        "may": may(status, reading.plan),
        "lines": reading.lines,
        "step": {"text": latest.text, "share": latest.share} if latest is not None else None,
        "running": reading.running,
        "waiting": reading.waiting,
        "tokens": counts.tokens,
        "tokens_per_s": (counts.tokens - before["tokens"]) / passed_s if before and is_near else None,
        "ttft_ms": _ms(reading.first),
        "inter_token_ms": _ms(reading.following),
        "answers": dict(counts.answers),
        "refused": counts.refused,
        "failed": dict(counts.failed),
        "served": status.served,
        "bypassed": dict(status.bypassed),
        "batching": status.batching,
    }


def _ms(found: Percentiles | None) -> dict[str, float] | None:
    return {"p50": 1e3 * found.p50_s, "p99": 1e3 * found.p99_s} if found is not None else None


def may(status: Status, plan: Plan | None) -> dict[str, bool]:
    """Return whether a plan that serves, or may again by itself, can be rolled back, and whether one can be committed.

    Args:
        plan: what tuning found, whether it serves or not.
    """
    has_plan = plan is not None and bool(plan.transforms)
    is_out = not status.transforms and status.state not in NO_SWITCH
    may_return = has_plan and status.state in MAY_RETURN
    return {"rollback": bool(status.transforms) or may_return, "commit": has_plan and is_out}


class Feed:
    """Samples once a second while somebody watches, and gives each sample to all who do.

    A watcher that reads slowly misses samples; nothing is queued for it. All methods are called in the event loop.

    Args:
        sample: makes a sample from the one before.
        every_s: seconds between two.
        most: watchers at once.

    Attributes:
        watchers: how many watch now.
    """

    def __init__(
        self, sample: Callable[[Sample | None], Sample], every_s: float = EVERY_S, most: int = MOST_WATCHERS
    ) -> None:
        self._read = sample
        self._every_s = every_s
        self._most = most
        self._past = deque[Sample](maxlen=PAST)
        self._latest = b""
        self._came = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._has_ended = False
        self.watchers = 0

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield server-sent events: the past samples as one event `history`, then each sample as it comes.

        Raises:
            Refusal: too many watch, or the server ends.
        """
        if self._has_ended:
            raise Refusal(503, "the server is ending; nothing more is to be watched", code="ending")
        if self.watchers >= self._most:
            raise Refusal(429, f"{self.watchers} pages watch this server, the most; close one", code="watchers")
        self.watchers += 1
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run())
                self._task.add_done_callback(lambda _: self._tell(b""))  # also if it is cancelled before it began
            task, came = self._task, self._came
            yield _event([{name: sample[name] for name in CHARTED} for sample in self._past], "history")
            while True:
                await came.wait()
                if task.done():
                    return
                came = self._came  # before the next suspension, so that no sample is given twice
                if self._latest:
                    yield self._latest
        finally:
            self.watchers -= 1
            if not self.watchers and self._task is not None:
                self._task.cancel()
                self._task = None

    def end(self) -> None:
        """End all streams, and begin none."""
        self._has_ended = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        before: Sample | None = self._past[-1] if self._past else None
        try:
            while True:
                before = self._read(before)
                self._past.append(before)
                self._tell(_event(before))
                await asyncio.sleep(self._every_s)
        except Exception:  # the watchers' streams end, and their pages ask again
            log.exception("a sample for the watchers failed")

    def _tell(self, latest: bytes) -> None:
        self._latest, came = latest, self._came
        self._came = asyncio.Event()
        came.set()


def _event(data: object, name: str | None = None) -> bytes:
    kind = f"event: {name}\n" if name else ""
    return f"{kind}data: {json.dumps(data, allow_nan=False)}\n\n".encode()
