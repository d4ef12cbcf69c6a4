"""`model.autotune`: the handle of a wrapped model, from the first observed call to the last served one."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from .. import workload
from ..errors import DeviceError, StateError, UnreadyError, VariantError, WorkloadError, in_words, warn
from ..machine import device as devices
from ..machine import ending, forking, outside
from ..machine.ending import Cancelled
from ..model import modes, route, seam, stateful
from ..model.linear_layers import stored_bytes
from ..model.revision import Revision
from ..report.progress import Doing, said
from ..runtime.attempt import Attempt
from ..runtime.traffic import Traffic
from ..runtime.variant import Variant, serves_forward
from ..workload import Observer, Workload
from .again import Again
from .options import KeepOriginal, Options
from .original import RELOAD, Original, releasable_bytes
from .status import State, Status
from .watch.watch import Event, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..report import Report
    from ..tune.plan import Plan
    from ..tune.run import Tuned

log = logging.getLogger("autotune")

CALLED_OFF = "tuning was called off: the model was unwrapped, or the process ends"
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


class Handle:
    """`model.autotune`: the state of a wrapped model, and the operations on it."""

    def __init__(self, model: PreTrainedModel, options: Options) -> None:
        self.options = options
        self._model = model
        self._original = Original(model)
        self._notify = options.progress or log.info
        self._quiet = options.progress is None
        self._observer = Observer(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None))
        self._given: Workload | None = None
        self._traffic = Traffic()
        self._again = Again(self._traffic.rest)
        self._tuned: Tuned | None = None
        self._active: Variant | None = None
        self._revision: Revision | None = None
        self._stale: str | None = None  # how the model differs from when it was tuned, as of the latest call
        self._watch = Watch(options.watch, changed=self._note)
        self._tuning = forking.lock()
        self._thread: threading.Thread | None = None
        self._served = 0
        self._bypassed: Counter[str] = Counter()
        self._problem: str | None = None  # why the model's calls are not routed
        self._state: State = "observing"
        self._detail = f"tuning starts after {options.observe} calls"
        if options.when == "manual":
            self._state = "waiting"
            self._detail = "tuning starts with .tune()"
        forking.tell(self)

    # What users call

    @property
    def status(self) -> Status:
        """The model's state: what serves, which calls the plan served, which it did not, and why."""
        serves = self._active is not None and self._stale is None and not self._watch.open()
        names = tuple(map(str, self._active.transforms)) if self._active and serves else ()
        speculation = self._active.speculation if self._active else None
        return Status(
            self._state,
            self._again.said(self._detail) if self._state == "original" else self._detail,
            names,
            self._served,
            dict(self._bypassed),
            self._original.place,
            speculation.tally if speculation else None,
            self._watch.summary() if self._active else "",
        )

    @property
    def events(self) -> tuple[Event, ...]:
        """When and why the committed plan was taken out of service or put back; the latest 100 events."""
        return tuple(self._watch.events)

    @property
    def plan(self) -> Plan | None:
        """The plan that tuning found, whether committed or not; None before tuning."""
        return self._tuned.plan if self._tuned else None

    def report(self) -> Report:
        """Return the report on what was measured and decided.

        Raises:
            StateError: nothing was tuned yet.
        """
        if self._tuned is None:
            raise StateError(f"there is no report: the state is {self._state!r} ({self._detail}); call .tune() first")
        return self._tuned.report.with_calls(self._served, dict(self._bypassed))

    def tune(self, workload: Any = None) -> Report:
        """Tune now and commit the winner. Returns when done.

        Args:
            workload: prompts as `wrap` takes them; default: those given to `wrap`, or the calls observed so far.

        Raises:
            WorkloadError: no prompts were given and none were observed, or they cannot be used.
            StateError: tuning is under way already, the original was released, or the model is passed through.
        """
        self._bring_back("tune again")
        if self._problem is not None:
            raise StateError(self._problem)
        if workload is not None:
            self._given = self.read(workload)
        if self._given is None and not self._observer.ready(1):
            raise WorkloadError("nothing to tune for: no call was observed yet; pass prompts, .tune(workload=[...])")
        work = self._given or self._observer.workload()
        if not self._tuning.acquire(blocking=False):
            raise StateError("tuning is under way already; wait for it, see .status")
        self._again.drop()
        try:
            self._run_here(work)
        finally:
            self._tuning.release()
        return self.report()

    def commit(self, *, keep_original: KeepOriginal = True) -> None:
        """Serve with the plan that was found (again, after a rollback).

        Args:
            keep_original: False permanently frees the original's weights that the plan does not use. The model stays
                the same object and serves as before. Calls that the plan cannot serve run through the plan's layers in
                transformers' loop. Rollback, unwrap, tuning and saving are no longer possible. "parked" moves the
                weights from the GPU to the host's memory instead; an operation that needs them moves them back. Waits
                for calls under way. Moves nothing if the plan uses all of the original's weights.

        Raises:
            StateError: there is no plan, the model changed since tuning, tuning under way needs the original, or
                "parked" was asked for and the original is already in the host's memory.
        """
        if self._tuned is None:
            raise StateError("there is no plan to commit; call .tune() first")
        if change := self._change():
            remedy = RELOAD if self._original.place == "released" else "call .tune() again"
            raise StateError(f"the plan is stale: {change}; {remedy}")
        self._switch(self._tuned.variant)
        if keep_original is True:
            return
        if not self._tuning.acquire(blocking=False):
            raise StateError("the original is needed while tuning is under way; wait for it, see .status")
        try:
            self._send_away(park=keep_original == "parked")
        finally:
            self._tuning.release()

    def rollback(self) -> None:
        """Serve with the original from the next call on. Calls under way finish with what they started with.

        Raises:
            StateError: the original was released.
        """
        self._bring_back("roll back")
        self._active = None
        self._state = "rolled back"
        self._detail = "the original serves; .commit() brings the plan back"

    def unwrap(self) -> PreTrainedModel:
        """Stop, and leave the model exactly as it was before `wrap`.

        Raises:
            StateError: the original was released.
        """
        self._bring_back("unwrap")
        self._traffic.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._active = None
        route.detach(self._model)
        return self._model

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy the handle as None, so that a copy of a passed-through model is a plain model."""
        return type(None), ()

    def pass_through(self, reason: str) -> None:
        """Attach the handle but leave every call to the model, because its calls cannot be routed.

        Args:
            reason: why they cannot be routed, in words.
        """
        self._state = "passed through"
        self._detail = reason
        self._problem = reason
        route.hold(self._model, self)

    # What the routed model calls

    def sample(self, call: seam.Sampling) -> Any:
        devices.of(self._model).check()
        with self._traffic.request():
            if self._is_unserved():
                return call.original()
            variant = self._fresh()
            if variant is not None:
                reason = variant.unsupported(call)
                reason = reason or (None if self._watch.admits(call.input_ids.shape[0]) else RESTING)
                if reason is None:
                    return self._serve(variant, call)
                self._bypassed[reason] += 1
            result = call.original() if variant is None else self._watch.serve_other(call)
        if self._state in ("observing", "waiting"):
            self._observe_call(call)
        return result

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        devices.of(self._model).check()
        original = partial(seam.bare_class(model).forward, model, *args, **kwargs)
        with self._traffic.request():
            if self._is_unserved():
                return original()
            variant = self._fresh()
            if variant is None or self._watch.open():
                return original()
            if not serves_forward(args, kwargs):
                self._bypassed["forward with a cache of the caller's, gradients or extra arguments"] += 1
                return original()
            return self._serve_forward(variant, args, kwargs, original)

    def other_loop(self, name: str) -> AbstractContextManager[None]:
        if self._active is not None:
            self._bypassed[name.strip("_").replace("_", " ")] += 1
        return self._traffic.request()

    # How it works

    def after_fork(self) -> None:
        """Reset the state in a forked child: a thread of the parent tunes on, but only in the parent."""
        if self._state == "tuning":
            self._state = "waiting" if self.options.when == "manual" else "observing"
            self._detail = "it was being tuned in the process that this one was forked from; this one may tune again"

    def start(self, work: Workload) -> None:
        """Tune for `work`, now or in the background."""
        self._given = work
        if self.options.when == "blocking":
            with self._tuning:
                self._run_here(work)
        elif self.options.when == "background" and self._tuning.acquire(blocking=False):
            self._spawn(work)

    def _is_unserved(self) -> bool:
        """Whether a torch mode is on in which no plan serves."""
        mode = modes.unserved()
        if mode is not None and self._active is not None:
            self._bypassed[mode] += 1
        return mode is not None

    def _fresh(self) -> Variant | None:
        """The variant to serve with, or None if there is none or the model has changed since tuning."""
        variant = self._active
        if variant is None:
            return None
        change = self._change()
        if change != self._stale:
            self._stale = change
            if change is None:
                self._turn("tuned", "the model is again what it was when it was tuned: the plan serves")
                log.info(self._detail)
            else:
                self._turn("stale")
                self._say(f"the model changed after tuning ({change})", "the plan serves again once that is undone")
        return variant if change is None else None

    def _change(self) -> str | None:
        """How the model differs from its state at tuning, or None."""
        if self._model.training:
            return "it is in training mode"
        return "it was never tuned" if self._revision is None else self._revision.changed()

    def _serve(self, variant: Variant, call: seam.Sampling) -> Any:
        attempt = Attempt(call, variant.device)
        try:
            result = self._watch.serve(variant, attempt.call)
        except DeviceError as dead:
            self._lose(dead)
            raise
        except Exception as error:
            theirs, fault = attempt.outsiders(error), Fault.of(error, variant)
        except BaseException:
            self._watch.abandoned(call)
            raise
        else:
            self._served += 1
            return result
        return self._recover(fault, theirs, partial(attempt.again, seam.Sampling.original), call)

    def _serve_forward(
        self, variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any], original: Callable[[], Any]
    ) -> Any:
        try:
            result = variant.forward(self._model, args, kwargs)
        except DeviceError as dead:
            self._lose(dead)
            raise
        except Exception as error:
            theirs, fault = outside.delivered(error), Fault.of(error, variant)
        else:
            self._served += 1
            return result
        return self._recover(fault, theirs, original)

    def _lose(self, failure: DeviceError) -> None:
        """Record that the device failed. Nothing can be retried on it."""
        self._active = None
        self._state = "failed"
        self._detail = str(failure)

    def _recover(
        self,
        fault: Fault,
        theirs: BaseException | None,
        original: Callable[[], Any],
        call: seam.Sampling | None = None,
    ) -> Any:
        """Return the original's answer after the plan raised.

        Call it outside of the `except` block, when no exception keeps the plan's memory alive.

        Args:
            fault: what was wrong with the plan.
            theirs: the exception from the caller's code that caused the failure, or None.
            original: computes the answer from a clean state.
            call: the call of generate's loop, or None for a direct forward.
        """
        if theirs is not None:
            self._watch.abandoned(call)
            raise theirs
        devices.of(self._model).trim()
        try:
            result = original()
        except BaseException:  # the call was at fault, not the plan
            self._watch.abandoned(call)
            raise
        if fault.unready and call is not None:
            self._bypassed["no room or no step for a batch of that size"] += 1
            self._watch.unready(call)
            warn(f"{fault.reason}; {self._other()} for such calls")
        else:
            self._watch.failed(f"the plan failed: {fault.reason}")
            warn(self._detail)
        return result

    def _note(self, event: Event) -> None:
        """Update the state after the plan was taken out of service or put back."""
        if event.phase == "closed":
            self._turn("tuned", f"{event.reason}; the plan serves again")
        elif event.phase != "half-open":
            again = "; the plan is tried again later" if event.phase == "open" else "; the plan failed too often"
            self._turn("failed", f"{event.reason}; {self._other()}{again}")

    def _turn(self, state: State, detail: str = "") -> None:
        """Set the state after an event of the serving plan. During tuning the state stays "tuning"."""
        self._detail = detail or self._detail
        if self._state != "tuning":
            self._state = state

    def _other(self) -> str:
        """What serves instead of the plan, in words."""
        released = self._original.place == "released"
        return "the plan's layers serve in transformers' loop" if released else "the original serves"

    def _unwatchable(self) -> str | None:
        """Why the original cannot score a served call now, or None."""
        if self._original.place != "resident":
            return f"the original is {self._original.place}"
        return self._change() or (self._revision.look_closer() if self._revision else None)

    def _say(self, detail: str, remedy: str = "") -> None:
        """Warn that the plan does not serve: why, what serves instead, and the remedy."""
        remedy = RELOAD if self._original.place == "released" else remedy
        self._detail = "; ".join(filter(None, (detail, self._other(), remedy)))
        warn(self._detail)

    def _observe_call(self, call: seam.Sampling) -> None:
        try:
            self._consider(call)
        except Exception as error:  # the call was answered; observing it is optional
            log.warning("a call was not observed: %s: %s", type(error).__name__, error)

    def _consider(self, call: seam.Sampling) -> None:
        self._observer.observe(call.input_ids, call.mask, call.settings.max_length - call.input_ids.shape[1])
        if self.options.when == "manual" or not self._observer.ready(self.options.observe):
            return
        if not self._tuning.acquire(blocking=False):
            return
        if self.options.when == "blocking":
            self._run_and_unlock(self._observer.workload())
        else:
            self._spawn(self._observer.workload())

    def _spawn(self, work: Workload) -> None:
        self._state = "tuning"
        self._detail = "started"
        repeat = partial(self._again.keep_trying, WeakMethod(self._tune_by_itself), work)
        worker = ending.Worker(repeat, "autotune", stop=self._traffic.cancel)
        if worker.launch():
            self._thread = worker
        else:
            self._state = "observing"
            self._detail = "the process ends"
            self._tuning.release()

    def _tune_by_itself(self, work: Workload, again: bool) -> bool:
        """Tune in the background. Returns whether noise may have hidden a gain.

        Args:
            work: what to tune for.
            again: whether this is a repeated try, which is skipped if the state or the model has changed since.
        """
        if again and not (
            self._state == "original" and self._change() is None and self._tuning.acquire(blocking=False)
        ):
            return False
        self._run_and_unlock(work)
        return self._state == "original" and self._tuned is not None and self._tuned.noisy

    def _run_and_unlock(self, work: Workload) -> None:
        """Tune on behalf of a live call. An error in tuning must not fail the call."""
        try:
            self._run(work)
        except Cancelled:
            log.debug("tuning was called off")
        except Exception as error:
            if self._traffic.cancelled or ending.ends():  # the error is a consequence of stopping
                log.debug("tuning was called off", exc_info=True)
                return
            self._active = None
            self._state = "failed"
            self._say(f"tuning failed: {type(error).__name__}: {error}")
            log.debug("tuning failed", exc_info=True)
        finally:
            self._tuning.release()

    def _run_here(self, work: Workload) -> None:
        """Tune on behalf of a caller, who gets the errors."""
        try:
            self._run(work)
        except Cancelled:
            raise StateError(CALLED_OFF) from None

    def _run(self, work: Workload) -> None:
        from ..tune.run import tune

        self._state = "tuning"
        self._detail = "started"
        try:
            stateful.forget(self._model)
            revision = Revision(self._model)
            self._tuned = tune(
                route.bare(self._model),
                work,
                self.options.policy,
                tokenizer=self.options.tokenizer,
                draft=self.options.draft,
                cache=self.options.cache,
                traffic=self._traffic,
                notify=self._progress,
                serve=partial(self._serve_meanwhile, revision),
            )
        except Cancelled:
            self._active = None
            self._state = "original"
            self._detail = CALLED_OFF
            raise
        except BaseException as error:
            self._active = None
            self._state = "failed"
            self._detail = f"{type(error).__name__}: {error}"
            raise
        devices.of(self._model).trim()  # frees the memory that measuring and judging used
        if change := revision.differs():
            raise StateError(f"the model changed while it was being tuned ({change}); call .tune() again")
        self._revision = revision
        self._switch(self._tuned.variant)
        if self._quiet and self._tuned.doubt is not None:  # a progress callback got this message already
            log.warning("%s. This is not kept as a plan: %s", self._tuned.verdict, self._tuned.doubt)
        if self.options.keep_original is not True:
            self._send_away(park=self.options.keep_original == "parked")

    def _serve_meanwhile(self, revision: Revision, variant: Variant) -> None:
        """Serve with a proven variant while tuning goes on, unless the model changed or was rolled back meanwhile.

        Its speed is not watched: times of calls that overlap with tuning say nothing about it.
        """
        if self._state == "tuning" and revision.differs() is None:
            self._revision = revision
            self._put_in(variant)
            self._watch.begin(variant, None, self._unwatchable)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold this context while no request is in flight."""
        try:
            with self._traffic.step():
                yield
        except Cancelled:
            raise StateError("the model was unwrapped meanwhile, or the process ends") from None

    def _progress(self, step: str) -> None:
        self._detail = said(step)
        if not (self._quiet and isinstance(step, Doing) and step.share):  # a log shows steps, not shares
            self._notify(step)

    def _switch(self, variant: Variant) -> None:
        self._put_in(variant)
        self._state = "tuned" if variant.transforms else "original"
        self._detail = self._tuned.verdict if self._tuned else ""
        self._watch.begin(
            variant, self._tuned.plan if self._tuned else None, self._unwatchable, stored=self.options.cache
        )

    def _put_in(self, variant: Variant) -> None:
        self._active = variant if variant.transforms else None
        self._stale = None

    def _send_away(self, park: bool) -> None:
        """Park or release the original's weights, except those that the plan still uses."""
        if self._original.place == "released" or self._tuned is None or (park and self._original.place == "parked"):
            return
        if self._traffic.cancelled:
            raise StateError("the model was unwrapped; wrap it again to commit a plan without its original")
        variant = self._tuned.variant
        if self._original.place == "resident" and not releasable_bytes(self._model, variant):
            log.info("the original stays: the plan uses all of its weights")
            return
        with self._alone():
            self._original.park(variant) if park else self._original.release(variant)
            self._revision = Revision(self._model)
        report = self._tuned.report.without_original(stored_bytes(*variant.modules.values()))
        self._tuned = replace(self._tuned, report=report)

    def _bring_back(self, what: str) -> None:
        """Move parked weights of the original back. Drops the plan if it leaves no room for them.

        Args:
            what: the operation that needs the weights, for the message.

        Raises:
            StateError: the original was released.
        """
        self._original.require(what)
        if self._original.place != "parked" or self._tuned is None:
            return
        with self._alone():
            device, report = devices.of(self._model), self._tuned.report.without_original(None)
            self._active = None
            self._tuned = replace(self._tuned, report=report)
            if device.memory().free < self._original.parked_bytes:
                self._tuned = None
                device.trim()
                log.warning("the plan was dropped: beside it there was no room to bring the original back")
            self._original.restore()
            self._revision = Revision(self._model)

    def read(self, value: Any) -> Workload:
        return workload.read(value, tokenizer=self.options.tokenizer, model=self._model)
