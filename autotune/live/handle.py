"""`model.autotune`: the handle of a wrapped model, from the first observed call to the last served one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from .. import workload
from ..errors import StateError, WorkloadError
from ..machine import device as devices
from ..machine import ending, forking, intraop
from ..machine.ending import Cancelled
from ..model import route, seam, sharding, stateful
from ..model.linear_layers import stored_bytes
from ..model.revision import Revision
from ..report.progress import Doing, said
from ..runtime.batching.terms import RequestTerms
from ..runtime.traffic import Traffic
from ..runtime.variant import Variant
from ..workload import Observer, Workload
from .again import Again
from .former import Former
from .options import KeepOriginal, Options
from .original import RELOAD, Original, Residence, releasable_bytes
from .serving import Serving
from .status import State, Status
from .submit import Submissions, Submitted
from .watch.watch import Event

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..report import Report
    from ..tune.plan import Plan
    from ..tune.tuned import Tuned

log = logging.getLogger("autotune")

CALLED_OFF = "tuning was called off: the model was unwrapped, or the process ends"


class Handle:
    """`model.autotune`: the state of a wrapped model, and the operations on it."""

    def __init__(self, model: PreTrainedModel, options: Options) -> None:
        self.options = options
        self._model = model
        self._notify = options.progress or log.info
        self._quiet = options.progress is None
        self._observer = Observer(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None))
        self._given: Workload | None = None
        self._traffic = Traffic()
        self._again = Again(self._traffic.rest)
        self._tuned: Tuned | None = None
        self._sharded = sharding.reason(model)
        self._is_adopted = False  # whether what serves was adopted, and so is not in the store
        self._serving = Serving(model, self._traffic, share=options.watch, observe=self._observe_call)
        self._submissions = Submissions(model, self._serving.at_once)
        self._tuning = forking.lock()
        self._thread: threading.Thread | None = None
        self._problem: str | None = None  # why the model's calls are not routed
        if options.when == "manual":
            by_all = f" on every rank: {self._sharded}" if self._sharded else ""
            self._serving.become(State.WAITING, f"tuning starts with .tune(){by_all}")
        else:
            self._serving.become(State.OBSERVING, f"tuning starts after {options.observe} calls")
        forking.tell(self)

    # What users call

    @property
    def _original(self) -> Original:
        return self._serving.original

    @property
    def status(self) -> Status:
        """The model's state: what serves, which calls the plan served, which it did not, and why."""
        serving = self._serving
        active, detail = serving.active, serving.detail
        return Status(
            serving.state,
            self._again.said(detail) if serving.state is State.ORIGINAL else detail,
            tuple(map(str, active.transforms)) if active and serving.serves else (),
            serving.served,
            dict(serving.bypassed),
            serving.original.place,
            active.speculation.tally if active and active.speculation else None,
            serving.watch.summary() if active else "",
            active.batching if active and serving.serves else "",
            self._submissions.waiting + (active.waiting if active else 0),
            active.reused if active else 0,
        )

    @property
    def events(self) -> tuple[Event, ...]:
        """When and why the committed plan was taken out of service or put back; the latest 100 events."""
        return tuple(self._serving.watch.events)

    @property
    def plan(self) -> Plan | None:
        """The plan that tuning found, whether committed or not; None before tuning."""
        return self._tuned.plan if self._tuned else None

    @property
    def fault(self) -> str | None:
        """Why the plan is out of service, in a sentence; None if it serves, or rests only because it seemed slow."""
        serving = self._serving
        if self._tuned is None or not self._tuned.variant.transforms or serving.serves or serving.watch.is_slow:
            return None
        return f"{serving.state}: {serving.detail}"

    def report(self) -> Report:
        """Return the report on what was measured and decided.

        Raises:
            StateError: nothing was tuned yet.
        """
        if self._tuned is None:
            state, detail = self._serving.state, self._serving.detail
            raise StateError(f"there is no report: the state is '{state}' ({detail}); call .tune() first")
        return self._tuned.report.with_calls(self._serving.served, dict(self._serving.bypassed))

    def tune(self, workload: Any = None) -> Report:
        """Tune now and commit the winner. Returns when done.

        If the model's layers are sharded over ranks, all ranks call it with the same workload.

        Args:
            workload: prompts as `wrap` takes them; default: those given to `wrap`, or the calls observed so far.

        Raises:
            WorkloadError: no prompts were given and none were observed, or they cannot be used.
            StateError: tuning is under way already, the original was released, or the model is passed through.
        """
        self._bring_back("tune again")
        work = self._work(workload)
        with self._alone_in_tuning():
            self._run_here(work)
        return self.report()

    def adopt(self, plan: Plan) -> Former:
        """Verify another plan on this machine, beside the requests, and serve with it. Nothing is searched for.

        Returns:
            What served before, for `restore`.

        Raises:
            PlanError: it was made for another model, or does not hold here. What served before serves on.
            WorkloadError: no prompts were given to `wrap` and none were observed.
            StateError: tuning is under way, the original was released, or the model is passed through or changed.
        """
        from ..tune.run import verified

        self._bring_back("verify another plan")
        options, work = self.options, self._work()
        with self._alone_in_tuning():
            revision = Revision(self._model)
            try:
                tuned = verified(
                    route.bare(self._model),
                    work,
                    options.policy,
                    plan,
                    tokenizer=options.tokenizer,
                    draft=options.draft,
                    traffic=self._traffic,
                    notify=self._notify,
                )
            except Cancelled:
                raise StateError(CALLED_OFF) from None
            finally:
                devices.of(self._model).trim()
            if change := revision.differs():
                raise StateError(f"the model changed while the plan was verified ({change})")
            serving = self._serving
            former = Former(
                self._tuned, serving.active, serving.revision, serving.state, serving.detail, self._is_adopted
            )
            self._tuned, serving.revision, self._is_adopted = tuned, revision, True
            self._switch(tuned.variant)
        return former

    def restore(self, former: Former) -> None:
        """Serve with what served before `adopt`, from the next call on. Calls under way finish as they began."""
        serving, plan = self._serving, former.tuned.plan if former.tuned else None
        self._tuned, serving.revision, self._is_adopted = former.tuned, former.revision, former.is_adopted
        self._begin(former.active or Variant(route.bare(self._model), self._traffic), plan)
        serving.become(former.state, former.detail)

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
        if change := self._serving.change():
            remedy = RELOAD if self._original.place is Residence.RELEASED else "call .tune() again"
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
        self._serving.active = None
        self._serving.become(State.ROLLED_BACK, "the original serves; .commit() brings the plan back")

    def unwrap(self) -> PreTrainedModel:
        """Stop, and leave the model exactly as it was before `wrap`.

        Raises:
            StateError: the original was released.
        """
        self._bring_back("unwrap")
        self._traffic.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._serving.active = None
        route.detach(self._model)
        return self._model

    def submit(
        self,
        input_ids: Any,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Submitted:
        """Begin to generate for one prompt, and return at once.

        If the plan decodes several callers' sequences together (`continuous_batching`), so are submitted ones.
        Otherwise they are generated one at a time, in the order of their priorities and arrivals.

        Args:
            input_ids: the prompt's token ids, a list or a tensor [P] or [1, P].
            priority: a larger number goes first, by one second of waiting for each step.
            deadline_s: seconds from now after which nobody wants the answer; it is then given up.
            seed: with `do_sample=True`, the tokens depend on it and on the request alone, not on what else runs.
            **options: as in `generate`, but for a streamer.

        Returns:
            The request: iterate over it for new tokens, `result()` waits for the sequence, `cancel()` gives it up.

        Raises:
            QueueFullError: too many requests wait.
            StateError: the process ends, or the model is sharded over ranks.
            WorkloadError: `input_ids` are not the token ids of one prompt, or an option does not suit one streamed
                sequence.
        """
        if self._sharded:
            raise StateError(f"requests cannot be submitted: {self._sharded}; call generate on all ranks in one order")
        return self._submissions.submit(input_ids, RequestTerms(priority, deadline_s, seed), options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy the handle as None, so that a copy of a passed-through model is a plain model."""
        return type(None), ()

    def pass_through(self, reason: str) -> None:
        """Attach the handle but leave every call to the model, because its calls cannot be routed.

        Args:
            reason: why they cannot be routed, in words.
        """
        self._serving.become(State.PASSED_THROUGH, reason)
        self._problem = reason
        route.hold(self._model, self)

    # What the routed model calls

    def sample(self, call: seam.Sampling) -> Any:
        return self._serving.sample(call)

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._serving.forward(model, args, kwargs)

    def other_loop(self, name: str) -> AbstractContextManager[object]:
        return self._serving.other_loop(name)

    # How it works

    def after_fork(self) -> None:
        """Reset the state in a forked child: a thread of the parent tunes on, but only in the parent."""
        if self._serving.state is State.TUNING:
            state = State.WAITING if self.options.when == "manual" else State.OBSERVING
            detail = "it was being tuned in the process that this one was forked from; this one may tune again"
            self._serving.become(state, detail)

    def start(self, work: Workload) -> None:
        """Tune for `work`, now or in the background."""
        self._given = work
        if self.options.when == "blocking":
            with self._tuning:
                self._run_here(work)
        elif self.options.when == "background" and self._tuning.acquire(blocking=False):
            self._spawn(work)

    def _observe_call(self, call: seam.Sampling) -> None:
        if self._serving.state not in (State.OBSERVING, State.WAITING):
            return
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
        self._serving.become(State.TUNING, "started")
        repeat = partial(self._again.keep_trying, WeakMethod(self._tune_by_itself), work)
        worker = ending.Worker(repeat, "autotune", stop=self._traffic.cancel)
        if worker.launch():
            self._thread = worker
        else:
            self._serving.become(State.OBSERVING, "the process ends")
            self._tuning.release()

    def _tune_by_itself(self, work: Workload, again: bool) -> bool:
        """Tune in the background. Returns whether noise may have hidden a gain.

        Args:
            work: what to tune for.
            again: whether this is a repeated try, which is skipped if the state or the model has changed since.
        """
        serving = self._serving
        if again and not (
            serving.state is State.ORIGINAL and serving.change() is None and self._tuning.acquire(blocking=False)
        ):
            return False
        self._run_and_unlock(work)
        return serving.state is State.ORIGINAL and self._tuned is not None and self._tuned.noisy

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
            self._serving.fail("")
            self._serving.say(f"tuning failed: {type(error).__name__}: {error}")
            log.debug("tuning failed", exc_info=True)
        finally:
            self._tuning.release()

    def _work(self, workload: Any = None) -> Workload:
        """What to tune for: the given prompts, or the calls observed so far."""
        if self._problem is not None:
            raise StateError(self._problem)
        if workload is not None:
            self._given = self.read(workload)
        if self._given is None and not self._observer.ready(1):
            raise WorkloadError("nothing to tune for: no call was observed yet; pass prompts, .tune(workload=[...])")
        return self._given or self._observer.workload()

    @contextmanager
    def _alone_in_tuning(self) -> Iterator[None]:
        """Hold this context while this thread alone tunes, on behalf of a caller."""
        if not self._tuning.acquire(blocking=False):
            raise StateError("tuning is under way already; wait for it, see .status")
        self._again.drop()
        try:
            yield
        finally:
            self._tuning.release()
            intraop.rest()

    def _run_here(self, work: Workload) -> None:
        """Tune on behalf of a caller, who gets the errors."""
        try:
            self._run(work)
        except Cancelled:
            raise StateError(CALLED_OFF) from None

    def _run(self, work: Workload) -> None:
        from ..tune.run import tune

        self._serving.become(State.TUNING, "started")
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
                plan=self.options.plan,
                traffic=self._traffic,
                notify=self._progress,
                serve=partial(self._serve_meanwhile, revision),
            )
            self._is_adopted = False
        except Cancelled:
            self._serving.active = None
            self._serving.become(State.ORIGINAL, CALLED_OFF)
            raise
        except BaseException as error:
            self._serving.fail(f"{type(error).__name__}: {error}")
            raise
        devices.of(self._model).trim()  # frees the memory that measuring and judging used
        if change := revision.differs():
            raise StateError(f"the model changed while it was being tuned ({change}); call .tune() again")
        self._serving.revision = revision
        self._switch(self._tuned.variant)
        if self._quiet and self._tuned.doubt is not None:  # a progress callback got this message already
            log.warning("%s. This is not kept as a plan: %s", self._tuned.verdict, self._tuned.doubt)
        if self.options.keep_original is not True:
            self._send_away(park=self.options.keep_original == "parked")

    def _serve_meanwhile(self, revision: Revision, variant: Variant) -> None:
        """Serve with a proven variant while tuning goes on, unless the model changed or was rolled back meanwhile."""
        if self._serving.state is State.TUNING and revision.differs() is None:
            self._serving.revision = revision
            self._serving.begin(variant, None)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold this context while no request is in flight."""
        try:
            with self._traffic.step():
                yield
        except Cancelled:
            raise StateError("the model was unwrapped meanwhile, or the process ends") from None

    def _progress(self, step: str) -> None:
        self._serving.detail = said(step)
        if not (self._quiet and isinstance(step, Doing) and step.share):  # a log shows steps, not shares
            self._notify(step)

    def _switch(self, variant: Variant) -> None:
        """Serve with the outcome of tuning."""
        verdict, plan = (self._tuned.verdict, self._tuned.plan) if self._tuned else ("", None)
        self._begin(variant, plan)
        self._serving.become(State.TUNED if variant.transforms else State.ORIGINAL, verdict)

    def _begin(self, variant: Variant, plan: Plan | None) -> None:
        """Serve with a variant. An adopted plan is not in the store, and its times may be another machine's."""
        if plan is not None and self._is_adopted:
            plan = replace(plan, latency=None)
        self._serving.begin(variant, plan, stored=self.options.cache and not self._is_adopted)

    def _send_away(self, park: bool) -> None:
        """Park or release the original's weights, except those that the plan still uses."""
        place = self._original.place
        if place is Residence.RELEASED or self._tuned is None or (park and place is Residence.PARKED):
            return
        if self._traffic.cancelled:
            raise StateError("the model was unwrapped; wrap it again to commit a plan without its original")
        variant = self._tuned.variant
        if place is Residence.RESIDENT and not releasable_bytes(self._model, variant):
            log.info("the original stays: the plan uses all of its weights")
            return
        with self._alone():
            self._original.park(variant) if park else self._original.release(variant)
            self._serving.revision = Revision(self._model)
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
        if self._original.place is not Residence.PARKED or self._tuned is None:
            return
        with self._alone():
            device, report = devices.of(self._model), self._tuned.report.without_original(None)
            self._serving.active = None
            self._tuned = replace(self._tuned, report=report)
            if device.memory().free < self._original.parked_bytes:
                self._tuned = None
                device.trim()
                log.warning("the plan was dropped: beside it there was no room to bring the original back")
            self._original.restore()
            self._serving.revision = Revision(self._model)

    def read(self, value: Any) -> Workload:
        return workload.read(value, tokenizer=self.options.tokenizer, model=self._model)
