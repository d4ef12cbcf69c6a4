"""What tuning found for a wrapped model: what serves by it, and where the original's weights are."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import StateError
from ..machine import device as devices
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

    from ..machine.device import Device
    from ..runtime.traffic import Traffic
    from ..tune.plan import Plan
    from ..tune.tuned import Tuned
    from .serving import Serving

log = logging.getLogger("autotune")

EXPERIMENT = "an experiment runs on the model, whose candidates may share the original's weights"


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
        """Serve with what served before. Calls under way finish as they began."""
        serving, plan = self._serving, former.tuned.plan if former.tuned else None
        self.tuned, serving.revision, self._is_adopted = former.tuned, former.revision, former.is_adopted
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
        """Park or release the original's weights, except those that the plan still uses."""
        place = self.original.place
        if place is Residence.RELEASED or self.tuned is None or (park and place is Residence.PARKED):
            return
        if self._traffic.cancelled:
            raise StateError("the model was unwrapped; wrap it again to commit a plan without its original")
        if route.has_layers(self._model):
            raise StateError(f"{EXPERIMENT}; end it first")
        variant = self.tuned.variant
        if place is Residence.RESIDENT and not releasable_bytes(self._model, variant):
            log.info("the original stays: the plan uses all of its weights")
            return
        with self._alone():
            if change := self._serving.change():  # it may have waited long
                raise StateError(f"the plan is stale: {change}; the original's weights stay where they are")
            try:
                self.original.park(variant) if park else self.original.release(variant)
            finally:
                self._serving.revision = Revision(self._model)
        report = self.tuned.report.without_original(stored_bytes(*variant.modules.values()))
        self.tuned = replace(self.tuned, report=report)

    def bring_back(self, what: str) -> bool:
        """Move parked weights of the original back. The plan goes on serving, if it has not changed and there is room.

        Args:
            what: the operation that needs the weights, for the message.

        Returns:
            Whether the plan was dropped.

        Raises:
            StateError: the original was released.
        """
        self.original.require(what)
        if self.original.place is not Residence.PARKED or self.tuned is None:
            return False
        with self._alone():
            device, report = devices.of(self._model), self.tuned.report.without_original(None)
            self.tuned = replace(self.tuned, report=report)
            revision = self._serving.revision
            if device.memory().free < self.original.parked_bytes:
                self._make_room(device)
            elif revision is not None and (change := revision.differs()):
                self._drop(f"the model changed while the original was parked ({change})")
            if not self._restored(device):
                self._make_room(device)
                self.original.restore()
            self._serving.revision = Revision(self._model)
        return self.tuned is None

    def _restored(self, device: Device) -> bool:
        """Move the original back. Returns False if the plan leaves less room than the device said; then, some is left.

        The error, which keeps memory alive, is gone when this returns.
        """
        try:
            self.original.restore()
        except Exception as error:
            if self.tuned is None or device.failure(error) != "memory":
                raise
            return False
        return True

    def _make_room(self, device: Device) -> None:
        self._drop("beside it there was no room to bring the original back")
        device.trim()

    def _drop(self, reason: str) -> None:
        """Drop the plan, so that its memory can be freed, and serve with the original."""
        said = f"the plan was dropped: {reason}"
        self.tuned = None
        self._begin(Variant(route.bare(self._model), self._traffic), None)
        self._serving.become(State.ORIGINAL, said)
        log.warning("%s", said)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold this context while no request is in flight, nor what is left in the plan's engine of one given up."""
        try:
            with self._traffic.step(pauses=False), self._resting():
                yield
        except Cancelled:
            raise StateError("the model was unwrapped meanwhile, or the process ends") from None

    def _resting(self) -> AbstractContextManager[object]:
        """Pause the plan's engine, if it has one. The context does not keep the plan in memory."""
        pause = self.tuned.variant.pause if self.tuned else None
        return nullcontext() if pause is None else pause()
