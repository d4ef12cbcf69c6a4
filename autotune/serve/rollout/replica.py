"""One replica's part in rollouts: verify a plan, serve with it, count, judge, follow."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import AutotuneError
from ...live.status import State
from ...machine import ending
from ...report.numbers import duration
from .decision import CanaryRules, Duty, Rollout, RolloutState, Seen, Sight, duty, judged
from .folder import Folder, Offer
from .record import record
from .tally import AnswerTally

if TYPE_CHECKING:
    from ...compare.experiment.store import Store
    from ...live.former import Former
    from ...live.handle import Handle
    from ...tune.plan import Plan

log = logging.getLogger("autotune.serve")

EVERY_S = 1.0  # seconds between two looks into the directory
UNSETTLED = (State.OBSERVING, State.TUNING)  # it tunes, or soon will


class Replica:
    """A process that serves one of a model's replicas.

    Args:
        folder: shared by the replicas.
        handle: of the model.
        rules: limits of a canary, the same for all replicas.
        store: where rollouts are recorded; None: nowhere.
        began: the promoted plan that the model was wrapped with, if any.
        clock: returns seconds since 1970.
    """

    def __init__(
        self,
        folder: Folder,
        handle: Handle,
        rules: CanaryRules,
        store: Store | None = None,
        began: tuple[Offer, Plan] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.rules = rules
        self.folder = folder
        self.tally = AnswerTally(rules)
        self._handle = handle
        self._store = store
        self._clock = clock
        self._adopted = began  # the plan that came by a rollout, whether it serves or not
        self._before: tuple[Former, tuple[Offer, Plan] | None] | None = None  # what a canary goes back to
        self._trying: Offer | None = None  # the canary's plan
        self._refused = dict[str, float]()  # hash of a plan that did not hold -> when it is verified again
        self._compared = ""  # key of the rollout whose figures are counted
        self._over = threading.Event()
        self._worker = ending.Worker(self._run, "autotune-rollout", stop=self._over.set)

    @property
    def is_canary(self) -> bool:
        """Whether it serves with a plan that the others do not have yet."""
        return self._trying is not None

    @property
    def serves(self) -> str | None:
        """Hash of the plan that it serves with, if that came by a rollout."""
        if self._adopted is None or self._handle.plan is not self._adopted[1]:
            return None
        return self._adopted[0].hash

    def start(self) -> None:
        """Take part from now on, in a thread."""
        self._worker.launch()

    def stop(self) -> None:
        """Take part no longer. A canary that stops is rolled back by the others."""
        self._over.set()
        self._worker.join()
        self.folder.lock.give()

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            try:
                self.step()
            except Exception:  # the directory may be reachable again later; a rollout must not end the service
                log.exception("a step of the rollout failed")

    def step(self) -> None:
        """Look into the directory once, and do what follows."""
        offered, promoted, rollout = self.folder.offered, self.folder.promoted, self.folder.rollout
        sight = Sight(
            replica=self.id,
            is_settled=self._handle.status.state not in UNSETTLED,
            offered=offered.hash if offered else None,
            rollout=rollout,
            promoted=promoted.hash if promoted else None,
            serves=self.serves,
            refused=frozenset(plan for plan, again_s in self._refused.items() if self._clock() < again_s),
        )
        match duty(sight):
            case Duty.TRY if offered is not None:
                self._alone(lambda: self._try(offered))
            case Duty.JUDGE if rollout is not None:
                self._judge(rollout)
            case Duty.COMPARE if rollout is not None:
                self._compare(rollout, sight.is_settled)
            case Duty.FOLLOW if promoted is not None:
                self._alone(lambda: self._follow(promoted))
            case Duty.NOTHING:
                self.tally.end()

    def _alone(self, do: Callable[[], None]) -> None:
        """Do something while no other replica verifies a plan; nothing if one does. A canary keeps the lock."""
        if not self.folder.lock.take():
            return
        try:
            do()
        finally:
            if not self.is_canary:
                self.folder.lock.give()

    def _try(self, offer: Offer) -> None:
        last = self.folder.rollout
        if last is not None and last.plan == offer.hash:  # another replica was quicker
            return
        self.folder.forget_figures()
        rollout = Rollout(offer.hash, self.id, self._clock())
        self.folder.write(rollout)
        self._say(rollout)
        try:
            plan = offer.plan()
            former = self._handle.adopt(plan)
        except AutotuneError as error:
            self._end(rollout.ended(RolloutState.ROLLED_BACK, f"the canary did not take the plan: {error}"))
            return
        self._before, self._adopted, self._trying = (former, self._adopted), (offer, plan), offer
        self.tally.begin()
        self.folder.write(replace(rollout, began_s=self._clock(), serves=True, reason="the canary serves"))

    def _judge(self, rollout: Rollout) -> None:
        if self._trying is None or self._before is None:  # it ended, but that could not be written down
            self._alone(lambda: self._end(self._left(rollout, "the canary lost its plan")))
            return
        seen = Seen(self._clock(), self.folder.control(rollout), self.tally.figures, failure=self._failure())
        after = judged(rollout, seen, self.rules)
        if after.state is RolloutState.CANARY:
            self.folder.write(after)
            return
        quality = self._handle.status.watch
        if after.state is RolloutState.PROMOTED:
            self.folder.promote(self._trying)
        else:
            former, self._adopted = self._before
            self._handle.restore(former)
        self._before = self._trying = None
        self.tally.end()
        self._end(after, quality)
        self.folder.lock.give()

    def _compare(self, rollout: Rollout, is_settled: bool) -> None:
        if not is_settled:  # answers beside its own tuning would make the canary look good
            self._compared = ""
            self.tally.end()
        elif rollout.key != self._compared:
            self._compared = rollout.key
            self.tally.begin()
        else:
            self.folder.publish(self.id, rollout, self.tally.figures)
        self._alone(self._bury)

    def _bury(self) -> None:
        """Roll a canary back whose process ended: this one has its lock."""
        rollout = self.folder.rollout
        if rollout is not None and rollout.state is RolloutState.CANARY:
            lost = judged(rollout, Seen(self._clock(), is_alive=False), self.rules)
            self._end(self._left(rollout, lost.reason))

    def _left(self, rollout: Rollout, reason: str) -> Rollout:
        """Return the outcome of a rollout that its canary left without saying so: it may have promoted the plan."""
        promoted = self.folder.promoted
        if promoted is not None and promoted.hash == rollout.plan:
            return rollout.ended(RolloutState.PROMOTED, f"the plan was promoted; then {reason}")
        return rollout.ended(RolloutState.ROLLED_BACK, reason)

    def _follow(self, offer: Offer) -> None:
        try:
            plan = offer.plan()
            self._handle.adopt(plan)
        except AutotuneError as error:
            self._refused[offer.hash] = self._clock() + self.rules.again_s
            again = duration(self.rules.again_s)
            log.warning("the promoted plan does not serve here: %s; it is verified again in %s", error, again)
        else:
            self._adopted = (offer, plan)
            log.info(json.dumps({"rollout": offer.hash, "replica": self.id, "state": "followed"}))

    def _failure(self) -> str | None:
        """Why the canary's plan no longer serves, or None. Whether it is slow is for the figures to say."""
        return self._handle.fault if self.serves is not None else "it was tuned anew"

    def _end(self, rollout: Rollout, quality: str = "") -> None:
        self.folder.write(rollout)
        self._say(rollout, quality)

    def _say(self, rollout: Rollout, quality: str = "") -> None:
        line = {"rollout": rollout.plan, "replica": self.id, "state": rollout.state, "reason": rollout.reason}
        log.info(json.dumps(line))
        if self._store is not None:
            record(self._store, rollout, self.rules, quality)
