"""What tuning found for a wrapped model: what serves by it, and where the original's weights are."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import StateError
from ..machine import forking
from ..machine.ending import Cancelled
from ..model import route
from ..model.linear_layers import stored_bytes
from ..model.revision import Revision
from ..runtime.variant import Variant
from .former import Former
from .original import Original, Residence, releasable_bytes
from .status import State

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..runtime.traffic import Traffic
    from ..tune.plan import Plan
    from ..tune.tuned import Tuned
    from .serving import Serving

log = logging.getLogger("autotune")

EXPERIMENT = "an experiment runs on the model, whose candidates may share the original's weights"
NO_ROOM = "beside it there was no room to bring the original back"


class Winner:
    """The winner of tuning: puts it into service, and frees or brings back the original's weights beside it.

    Args:
        model: the wrapped model.
        serving: routes the model's calls.
        traffic: in which every call takes part.
        cache: whether tuning keeps its plan in the store.

    Attributes:
        tuned: what tuning found; None before tuning.
    """

    def __init__(self, model: PreTrainedModel, serving: Serving, traffic: Traffic, *, cache: bool) -> None:
        self._model = model
        self._serving = serving
        self._traffic = traffic
        self._cache = cache
        self._moving = forking.lock()  # held while the original's weights are sent away
        self._is_adopted = False  # whether what serves was adopted, and so is not in the store
        self.tuned: Tuned | None = None

    @property
    def original(self) -> Original:
        return self._serving.original

    def replaced(self, tuned: Tuned, revision: Revision, *, is_adopted: bool = False) -> Former:
        """Serve with a new outcome from the next call on. Returns what served before.

        Args:
            tuned: the outcome.
            revision: what the model was when it was tuned.
            is_adopted: whether its plan was adopted rather than found here.
        """
        serving = self._serving
        former = Former(self.tuned, serving.active, serving.revision, serving.state, serving.detail, self._is_adopted)
        self.tuned, serving.revision, self._is_adopted = tuned, revision, is_adopted
        self.serve(tuned)
        return former

    def restore(self, former: Former) -> None:
        """Serve with what served before. Calls under way finish as they began.

        Raises:
            StateError: the original's weights were released since, and the present plan's serve.
        """
        were_moved = self.original.is_parked("serve with what served before")
        self.bring_back("serve with what served before")
        serving, plan = self._serving, former.tuned.plan if former.tuned else None
        revision = Revision(self._model) if were_moved else former.revision
        self.tuned, serving.revision, self._is_adopted = former.tuned, revision, former.is_adopted
        self._begin(former.active or Variant(route.bare(self._model), self._traffic), plan)
        serving.become(former.state, former.detail)

    def serve(self, tuned: Tuned) -> None:
        """Serve with the outcome of tuning."""
        self._begin(tuned.variant, tuned.plan)
        self._serving.become(State.TUNED if tuned.variant.transforms else State.ORIGINAL, tuned.verdict)

    def _begin(self, variant: Variant, plan: Plan | None) -> None:
        """Serve with a variant. An adopted plan is not in the store, and its times may be another machine's."""
        if plan is not None and self._is_adopted:
            plan = replace(plan, latency=None)
        self._serving.begin(variant, plan, stored=self._cache and not self._is_adopted)

    # Where the original's weights are

    def send_away(self, park: bool) -> None:
        """Park or release the original's weights, except those that the plan still uses. Waits for calls in flight.

        Raises:
            StateError: an experiment runs on the model, or the model was unwrapped, or this is within a call of it. Or
                it changed, or something else serves, by the time this has waited.
        """
        place = self.original.place
        if place is Residence.RELEASED or self.tuned is None or (park and place is Residence.PARKED):
            return
        if self._traffic.cancelled:
            raise StateError("the model was unwrapped; wrap it again to commit a plan without its original")
        self._require_no_experiment()
        variant = self.tuned.variant
        if place is Residence.RESIDENT and not releasable_bytes(self._model, variant):
            log.info("the original stays: the plan uses all of its weights")
            return
        with self._alone(), self._moving:
            self._require_no_experiment()  # this may have waited long
            if self._serving.active is not variant or self.original.place is not place:
                raise StateError("the plan no longer serves, or weights were moved meanwhile; call .commit() again")
            if change := self._serving.change():
                raise StateError(f"the plan is stale: {change}; the original's weights stay where they are")
            try:
                self.original.park(variant) if park else self.original.release(variant)
            finally:
                self._serving.revision = Revision(self._model)
            report = self.tuned.report.without_original(stored_bytes(*variant.modules.values()))
            self.tuned = replace(self.tuned, report=report)

    def _require_no_experiment(self) -> None:
        if route.has_layers(self._model):
            raise StateError(f"{EXPERIMENT}; end it first")

    @contextmanager
    def resident(self, what: str) -> Iterator[None]:
        """Bring the original's weights back, and let nothing send them away inside.

        Args:
            what: the operation that needs the weights, for the message.

        Raises:
            StateError: as `bring_back`.
        """
        while True:
            self.bring_back(what)
            with self._moving:  # a step that sends them away may have begun
                if self.original.place is Residence.RESIDENT:
                    yield
                    return

    def bring_back(self, what: str) -> None:
        """Move parked weights of the original back. The plan goes on serving, if it has not changed and there is room.

        If it is dropped, and there is no room all the same, calls are refused until this succeeds.

        Args:
            what: the operation that needs the weights, for the message.

        Raises:
            StateError: the original was released. Or its weights are parked, and this is within a call of the model, or
                the model was unwrapped while this waited.
        """
        if not self.original.is_parked(what):
            return
        with self._alone():
            if not self.original.is_parked(what):  # this may have waited long
                return
            with self._evaluating():
                if self.tuned is not None:
                    self._drop_if_needed()
                if not self._restored():
                    self._drop(NO_ROOM)
                    self.original.restore()
                self._serving.revision = Revision(self._model)
            if self.tuned is not None:
                self.tuned = replace(self.tuned, report=self.tuned.report.without_original(None))

    def _drop_if_needed(self) -> None:
        revision = self._serving.revision
        if self.original.device.memory().free < self.original.parked_bytes:
            self._drop(NO_ROOM)
        elif revision is not None and (change := revision.differs()):
            self._drop(f"the model changed while the original was parked ({change})")

    def _restored(self) -> bool:
        """Move the original back. Returns False if the plan leaves less room than the device said; then, some is left.

        The error, which keeps memory alive, is gone when this returns.
        """
        try:
            self.original.restore()
        except Exception as error:
            if self.tuned is None or self.original.device.failure(error) != "memory":
                raise
            return False
        return True

    def _drop(self, reason: str) -> None:
        """Drop the plan, free its memory, and serve with the original."""
        said = f"the plan was dropped: {reason}"
        self.tuned = self._serving.revision = None
        self.original.give_up_plan()
        self._begin(Variant(route.bare(self._model), self._traffic), None)
        self._serving.become(State.ORIGINAL, said)
        self.original.device.trim()
        log.warning("%s", said)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Take the plan's layers out of training mode, in which the caller may have put them for the original's.

        What the model object consists of at the end, which may be the original's layers, is put into training mode.
        """
        is_training = self._model.training
        if is_training:
            self._model.train(False)
        try:
            yield
        finally:
            if is_training:
                self._model.train()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold this context while no request is in flight, nor what is left in the plan's engine of one given up."""
        try:
            with self._traffic.step(pauses=False, resting=self._resting):
                yield
        except Cancelled:
            raise StateError("the model was unwrapped meanwhile, or the process ends") from None

    def _resting(self) -> AbstractContextManager[object]:
        """Pause the plan's engine, if it has one. The context does not keep the plan in memory."""
        pause = self.tuned.variant.pause if self.tuned else None
        return nullcontext() if pause is None else pause()
