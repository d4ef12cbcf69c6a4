"""Serves the calls of a wrapped model: with the plan where it can, else with the original."""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError, RequestError, UnreadyError, VariantError, in_words, warn
from ..machine import device as devices
from ..machine import intraop, outside
from ..model import modes, seam, sharding
from ..runtime import dispatch
from ..runtime.attempt import Attempt
from ..runtime.batching.terms import seeded
from .original import RELOAD, Original, Residence
from .status import State
from .watch.breaker import BreakerState, Event, Rules
from .watch.watch import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..model.revision import Revision
    from ..runtime.traffic import Pause, Traffic, Visit
    from ..runtime.variant import Variant
    from ..tune.plan import Plan

log = logging.getLogger("autotune")

RESTING = "the plan rests after it failed"


@dataclass(frozen=True)
class Fault:
    """What was wrong with a plan that raised.

    Args:
        reason: in words.
        unready: whether the fault concerns only batches of the call's size.
    """

    reason: str
    unready: bool

    @classmethod
    def of(cls, error: Exception, variant: Variant) -> Fault:
        reason = in_words(error, VariantError)
        return cls(reason, isinstance(error, UnreadyError) or variant.device.failure(error) == "memory")


class Serving:
    """Routes each call of a model, and turns to the original when the plan fails or the model changes.

    Args:
        model: the wrapped model.
        traffic: in which every call takes part.
        share: share of the served calls that the original scores again.
        observe: called with each call of generate's loop that the plan did not serve.

    Attributes:
        active: the variant that serves; None: the original.
        revision: what the model was when the variant was made.
        original: where the original's weights are.
        state, detail: as in `Status`.
        served, bypassed: as in `Status`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        traffic: Traffic,
        *,
        share: float,
        observe: Callable[[seam.Sampling], None],
    ) -> None:
        self._model = model
        self._traffic = traffic
        serving = weakref.ref(self)  # the traffic outlives an unused model, in a thread that rests
        traffic.pause_by(lambda: found.pause if (found := serving()) is not None else None)
        self._observe = observe
        self.original = Original(model)
        self.active: Variant | None = None
        self.revision: Revision | None = None
        self._stale: str | None = None  # how the model differs from when it was tuned, as of the latest call
        self._sharded = sharding.ranks(model) > 1  # then nothing may happen by one rank's clock or luck
        rules = Rules(most_flaps=0) if self._sharded else None
        self.watch = Watch(0.0 if self._sharded else share, rules=rules, changed=self._note)
        self.state = State.OBSERVING
        self.detail = ""
        self._caller: int | None = None  # identifier of the thread that called last
        self._has_many_callers = False
        self.served = 0
        self.bypassed: Counter[str] = Counter()

    @property
    def serves(self) -> bool:
        """Whether the plan serves calls now."""
        return self.active is not None and self._stale is None and not self.watch.open()

    def live_request(self) -> AbstractContextManager[object]:
        """Enclose an answer that an experiment's candidate gives: tuning measures nothing beside it."""
        return self._traffic.request()

    @property
    def pause(self) -> Pause | None:
        """Pauses the calls that the plan decodes together; None if it serves each by itself, or does not serve."""
        active = self.active
        return active.pause if active is not None and self.serves else None

    def at_once(self) -> float:
        """How many calls of `generate` gain from running at once: infinity if they are decoded together, else 1."""
        return 1 if self.pause is None else math.inf

    def become(self, state: State, detail: str) -> None:
        """Set the state and the sentence about it."""
        self.state = state
        self.detail = detail

    def begin(self, variant: Variant, plan: Plan | None, *, stored: bool = False) -> None:
        """Serve with a variant from the next call on; with the original if it has no transforms.

        Args:
            plan: the plan with its measurements. None while tuning goes on: then only failures are watched, because
                the times of calls that overlap with tuning say nothing about the variant. So it is, too, if the model
                is sharded over ranks; there a plan that fails does not serve again.
            stored: whether the plan is in the store, where its failures are then recorded.
        """
        self.active = variant if variant.transforms else None
        self._stale = None
        self.watch.begin(variant, None if self._sharded else plan, self.unwatchable, stored=stored)

    def fail(self, detail: str) -> None:
        """Take the plan out of service for good."""
        self.active = None
        self.become(State.FAILED, detail)

    # What the routed model calls

    def sample(self, call: seam.Sampling) -> Any:
        devices.of(self._model).check()
        try:
            return self._route(seeded(call))
        finally:
            self._rest()

    def _rest(self) -> None:
        """End the calling thread's idle workers if other threads call, too: they would slow the others' down."""
        caller = threading.get_ident()
        self._has_many_callers |= self._caller not in (None, caller)
        self._caller = caller
        if self._has_many_callers:
            intraop.rest()

    def _route(self, call: seam.Sampling) -> Any:
        with self._traffic.request() as visit:
            if self._is_unserved():
                return call.original()
            variant = self._fresh()
            if variant is not None:
                reason = dispatch.unsupported(variant, call)
                reason = reason or (None if self.watch.admits(call.input_ids.shape[0]) else RESTING)
                if reason is None:
                    return self._serve(variant, call, visit)
                self.bypassed[reason] += 1
            with self._alone():
                result = call.original() if variant is None else self.watch.serve_other(call)
        if not (self._traffic.is_inside() or call.is_draft):  # else it is a part of another call
            self._observe(call)
        return result

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        devices.of(self._model).check()
        original = partial(seam.bare_class(model).forward, model, *args, **kwargs)
        with self._traffic.request():
            if self._is_unserved():
                return original()
            variant = self._fresh()
            if variant is None or self.watch.open():
                return original()
            if not dispatch.serves_forward(args, kwargs):
                self.bypassed["forward with a cache of the caller's, gradients or extra arguments"] += 1
                with self._alone():
                    return original()
            return self._serve_forward(variant, args, kwargs, original)

    @contextmanager
    def other_loop(self, name: str) -> Iterator[None]:
        if self.active is not None:
            self.bypassed[name.strip("_").replace("_", " ")] += 1
        with self._traffic.request(), self._alone():
            yield

    # How it works

    def _alone(self) -> AbstractContextManager[object]:
        """Enclose what the original computes, so that it runs between two steps of calls that are decoded together."""
        pause = self.pause
        return nullcontext() if pause is None else pause()

    def _is_unserved(self) -> bool:
        """Whether a torch mode is on in which no plan serves."""
        mode = modes.unserved()
        if mode is not None and self.active is not None:
            self.bypassed[mode] += 1
        return mode is not None

    def _fresh(self) -> Variant | None:
        """The variant to serve with, or None if there is none or the model has changed since tuning."""
        variant = self.active
        if variant is None:
            return None
        change = self.change()
        if change != self._stale:
            self._stale = change
            if change is None:
                self._turn(State.TUNED, "the model is again what it was when it was tuned: the plan serves")
                log.info(self.detail)
            else:
                self._turn(State.STALE)
                self.say(f"the model changed after tuning ({change})", "the plan serves again once that is undone")
        return variant if change is None else None

    def change(self) -> str | None:
        """How the model differs from its state at tuning, or None."""
        if self._model.training:
            return "it is in training mode"
        return "it was never tuned" if self.revision is None else self.revision.changed()

    def _serve(self, variant: Variant, call: seam.Sampling, visit: Visit) -> Any:
        attempt = Attempt(call, variant.device)
        try:
            result = self.watch.serve(variant, attempt.call, visit.is_crowded)
        except DeviceError as dead:
            self.fail(str(dead))  # nothing can be retried on this device
            raise
        except RequestError:  # refused, late or cancelled: the original would not help
            self.watch.abandoned(variant, call)
            raise
        except Exception as error:
            theirs, fault = attempt.outsiders(error), Fault.of(error, variant)
        except BaseException:
            self.watch.abandoned(variant, call)
            raise
        else:
            self.served += 1
            return result
        return self._recover(variant, fault, theirs, partial(attempt.again, seam.Sampling.original), call)

    def _serve_forward(
        self, variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any], original: Callable[[], Any]
    ) -> Any:
        try:
            result = dispatch.forward(variant, self._model, args, kwargs)
        except DeviceError as dead:
            self.fail(str(dead))  # nothing can be retried on this device
            raise
        except Exception as error:
            theirs, fault = outside.delivered(error), Fault.of(error, variant)
        else:
            self.served += 1
            return result
        return self._recover(variant, fault, theirs, original)

    def _recover(
        self,
        variant: Variant,
        fault: Fault,
        theirs: BaseException | None,
        original: Callable[[], Any],
        call: seam.Sampling | None = None,
    ) -> Any:
        """Return the original's answer after the plan raised; of a sharded model, raise VariantError.

        Call it outside of the `except` block, when no exception keeps the plan's memory alive.

        Args:
            variant: what raised. Another one may serve by now, which it says nothing about.
            fault: what was wrong with it.
            theirs: the exception from the caller's code that caused the failure, or None.
            original: computes the answer from a clean state.
            call: the call of generate's loop, or None for a direct forward.
        """
        if theirs is not None:
            self.watch.abandoned(variant, call)
            raise theirs
        failed = f"the plan failed: {fault.reason}"
        if self._sharded:
            self.watch.failed(failed, variant=variant)
            raise VariantError(
                f"{fault.reason}; other ranks may be in the middle of this call, so it cannot be answered again here; "
                "the original serves from the next call on"
            )
        devices.of(self._model).trim()
        try:
            result = original()
        except BaseException:  # the call was at fault, not the plan
            self.watch.abandoned(variant, call)
            raise
        if fault.unready and call is not None:
            self.bypassed["no room or no step for a batch of that size"] += 1
            self.watch.unready(call, variant)
            warn(f"{fault.reason}; {self._other()} for such calls")
        else:
            self.watch.failed(failed, call=call, variant=variant)
            warn(self.detail if variant is self.active else failed)
        return result

    def _note(self, event: Event) -> None:
        """Update the state after the plan was taken out of service or put back. Nothing, if it was rolled back."""
        if self.active is None:
            return
        if event.phase is BreakerState.CLOSED:
            self._turn(State.TUNED, f"{event.reason}; the plan serves again")
        elif event.phase is not BreakerState.HALF_OPEN:
            again = "is tried again later" if event.phase is BreakerState.OPEN else "failed too often"
            self._turn(State.FAILED, f"{event.reason}; {self._other()}; the plan {again}")

    def _turn(self, state: State, detail: str = "") -> None:
        """Set the state after an event of the serving plan. During tuning the state stays TUNING."""
        self.detail = detail or self.detail
        if self.state is not State.TUNING:
            self.state = state

    def _other(self) -> str:
        """What serves instead of the plan, in words."""
        released = self.original.place is Residence.RELEASED
        return "the plan's layers serve in transformers' loop" if released else "the original serves"

    def unwatchable(self) -> str | None:
        """Why the original cannot score a served call now, or None."""
        if self.original.place is not Residence.RESIDENT:
            return f"the original is {self.original.place}"
        return self.change() or (self.revision.look_closer() if self.revision else None)

    def say(self, detail: str, remedy: str = "") -> None:
        """Warn that the plan does not serve: why, what serves instead, and the remedy."""
        remedy = RELOAD if self.original.place is Residence.RELEASED else remedy
        self.detail = "; ".join(filter(None, (detail, self._other(), remedy)))
        warn(self.detail)
