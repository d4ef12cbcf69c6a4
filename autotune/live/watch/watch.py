"""After commit: is the serving plan still as good and as fast as the proven one?

Every call's time per token is compared with what was measured at commit. A small share of calls is scored again: a few
served tokens are kept, and when no request is in flight, the plan's logits for them are compared with the original's.
What is found takes the plan out of service, or puts it back (`service`). A plan that became slower, but is faster than
the original was, is an event and no more.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...machine import ending
from ...machine.ending import Cancelled
from ...model import twins
from ...runtime import dispatch
from ...runtime.token_clock import TokenClock
from ...runtime.variant import Variant
from ...validate.tiers import TIERS
from .breaker import BreakerEvent, BreakerState, Cause, Event, Rules
from .canary import Sample, graphs, score
from .drift import Compilations, DivergenceCusum
from .paces import Kind, Paces
from .service import PlanService

if TYPE_CHECKING:
    from ...model.seam import Sampling
    from ...tune.plan import Plan

log = logging.getLogger("autotune")

IDLE_SHARE = 0.05  # largest share of time spent on scoring calls again


class Watch(PlanService):
    """Looks at the calls of the plan that serves: at their times, at what they compile, and at a share of the answers.

    Args:
        share: share of served calls that are scored again when the model is idle; 0 turns scoring off.
        rules: limits of the breaker.
        clock: returns monotonic seconds.
        chance: draws a random number from 0 to 1.
        changed: called with the event of every transition.
    """

    def __init__(
        self,
        share: float,
        *,
        rules: Rules | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        changed: Callable[[Event], None] = lambda event: None,
    ) -> None:
        super().__init__(rules or Rules(), clock, changed)
        self.share = share
        self.chance = chance
        self._worker: ending.Worker | None = None
        self._look_at(None, lambda: None)

    def begin(
        self, variant: Variant, plan: Plan | None, obstacle: Callable[[], str | None], stored: bool = False
    ) -> None:
        """Start watching a plan that serves now. Forgets everything about the previous one.

        Args:
            variant: the variant that serves.
            plan: the plan with its measurements; None while tuning goes on, when only failures are watched.
            obstacle: returns why the original cannot score now, or None.
            stored: whether the plan is in the store, where its failures are then recorded.
        """
        with self._lock:
            self._enter(variant, plan, stored=stored)
            self._look_at(plan, obstacle)

    def _look_at(self, plan: Plan | None, obstacle: Callable[[], str | None]) -> None:
        self._obstacle = obstacle
        tier = plan.fingerprint.tier if plan else "strict"
        self.divergence = DivergenceCusum(TIERS[tier].mean_kld if tier in TIERS else TIERS["strict"].mean_kld)
        self._paces = Paces(plan.latency if plan else None)
        self._compilations = Compilations()
        self._samples: deque[Sample] = deque(maxlen=1)
        self._latest: Sample | None = None
        self._rest_until_s = 0.0
        self.served = self.scored = 0

    # Around a call

    def serve(self, variant: Variant, call: Sampling, is_crowded: Callable[[], bool] = lambda: False) -> Any:
        """Run a call with a plan's variant, time it and perhaps keep it to be scored again.

        If another variant serves by the time the call ends, it says nothing about that one.

        Args:
            is_crowded: whether other calls were under way meanwhile; then its time says nothing about the plan.

        Raises what that raises; the caller must then call `failed`, `unready` or `abandoned`.
        """
        tokens = TokenClock(call.streamer, self.clock)
        before = graphs()
        result = dispatch.sample(variant, call.with_streamer(tokens))
        with self._lock:
            if variant is not self._variant:
                return result
            self.served += 1
            self._note_batch(call, BreakerEvent.SERVED)
            if self.breaker.phase is BreakerState.HALF_OPEN:
                self._step(BreakerEvent.SERVED, "the trial call was served")
                self._paces.begin_again()
            if self._plan is not None and not is_crowded():
                self._note_pace(call, tokens)
            if self._compilations.note(before, graphs()):
                self._compilations = Compilations()
                self.failed("calls compile over and over", Cause.RECOMPILING)
            if self._plan is not None and self.share and self.chance() < self.share:
                self._keep(call, result)
        return result

    def serve_other(self, call: Sampling) -> Any:
        """Run `call.original()`. While the plan is out for being slow, also time whether the original is faster."""
        was_slow = self.breaker.phase is BreakerState.OPEN and self.cause is Cause.LATENCY
        paces = self._paces
        if not was_slow or not paces.is_like_slow(Kind.of(call)):
            return call.original()
        tokens = TokenClock(call.streamer, self.clock)
        result = call.with_streamer(tokens).original()
        with self._lock:
            if paces is self._paces and (numbers := paces.acquitted(tokens)):
                reason = "the original is no faster: it is the machine that became slower"
                self._step(BreakerEvent.CLEARED, reason, numbers)
        return result

    def summary(self) -> str:
        """Describe in a sentence what is watched and what was seen."""
        seen = f"{self.scored} of {self.served} calls scored again"
        if self.divergence.samples:
            seen += f", mean KLD {self.divergence.mean:.2g}"
        obstacle = self._obstacle() if self.share else "watch=0"
        return f"{self.breaker.phase}; {seen}" + (f"; latency only: {obstacle}" if obstacle else "")

    # When idle

    def work(self) -> None:
        """Score the kept call, and retry a plan whose answers were at fault. Waits until no request is in flight.

        Raises:
            Cancelled: the model was unwrapped.
        """
        with self._lock:
            variant, retry = self._variant, self.breaker.due(self.clock()) and self.cause.is_of_answers
            sample = self._samples.popleft() if self._samples else self._latest if retry else None
            if sample is None or variant is None or (self.open() and not retry):
                return
            if retry:
                self._step(BreakerEvent.ASKED, "the kept call is scored again")
            obstacle = self._obstacle()
            # a twin, because hooks that the user sets from now on must see only the user's calls
            original = Variant(twins.fork(variant.original), variant.traffic) if obstacle is None else None
        start = self.clock()
        found = score(variant, sample, original)
        with self._lock:
            self._rest_until_s = self.clock() + (self.clock() - start) * (1 / IDLE_SHARE - 1)
            if variant is self._variant and self._obstacle() == obstacle:  # nothing changed meanwhile
                self._note_score(sample, found, retry, Cause.BROKEN if original is None else Cause.DRIFT)
            elif retry and variant is self._variant:
                self._step(BreakerEvent.ABANDONED, "the model changed while the kept call was scored again")

    def _note_score(
        self, sample: Sample, seen: tuple[float | None, str | None] | None, retry: bool, looked_for: Cause
    ) -> None:
        """Note what `score` returned. A trial shows nothing unless it looked for what took the plan out of service."""
        self.scored += 1
        self._latest = sample
        kld, defect = seen or (None, None)
        if defect is not None:
            return self.failed(f"the plan gives {defect}", looked_for)
        if retry:
            if kld is not None and kld > self.divergence.limit:
                return self.failed("the kept call still differs", Cause.DRIFT, {"KLD": kld})
            if seen is None or (kld is None and self.cause is Cause.DRIFT):
                reason = "the kept call could not be compared with the original's answer"
                return self._step(BreakerEvent.UNDECIDED, reason)
            self.divergence = DivergenceCusum(self.divergence.limit)
            sound = "sound again" if kld is None else "as the original would have it"
            return self._step(BreakerEvent.SERVED, f"the kept call is {sound}")
        if kld is None:
            return None
        self.divergence = found = self.divergence.after(kld)
        if found.alarmed:
            numbers = {"mean KLD": found.mean, "limit": found.limit, "samples": float(found.samples)}
            self.divergence = DivergenceCusum(found.limit)
            self.failed("the plan drifted away from the original", Cause.DRIFT, numbers)
        return None

    def _keep(self, call: Sampling, result: Any) -> None:
        if self.clock() < self._rest_until_s or self.open():
            return
        if (sample := Sample.of(call, result)) is not None:
            self._samples.append(sample)
            self._work_when_idle()

    def _work_when_idle(self) -> None:
        """Run in a short-lived thread, so that watching does not keep an unused model alive."""
        if self._variant is None or self._variant.traffic is None or (self._worker and self._worker.is_alive()):
            return
        self._worker = ending.Worker(self._work_quietly, "autotune-watch", stop=self._variant.traffic.cancel)
        try:
            self._worker.launch()
        except ending.NoThreadError as error:  # the call that is served now must not fail for it
            log.debug("served calls cannot be scored again now: %s", error)

    def _work_quietly(self) -> None:
        try:
            self.work()
        except Cancelled:
            log.debug("watching was called off")
        except Exception as error:  # a failure of the canary must not stop the plan
            log.warning("a served call could not be scored again: %s: %s", type(error).__name__, error)
            with self._lock:
                self._step(BreakerEvent.UNDECIDED, f"the kept call could not be scored again: {type(error).__name__}")

    def _note_pace(self, call: Sampling, tokens: TokenClock) -> None:
        if numbers := self._paces.slowed(Kind.of(call), tokens):
            reason = f"tokens take longer than at commit, at batch {call.input_ids.shape[0]}"
            if "original" in numbers:
                said = self._record(f"{reason}, but less than the original's did", numbers).reason
                log.warning("%s; the plan serves on", said)
            else:
                self.failed(reason, Cause.LATENCY, numbers)
