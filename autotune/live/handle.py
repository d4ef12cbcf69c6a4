"""`model.autotune`: the handle of a wrapped model, from the first observed call to the last served one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..errors import StateError
from ..model import route, seam, sharding
from ..runtime import kernels
from ..runtime.batching.load import EngineLoad
from ..runtime.batching.terms import RequestTerms
from ..runtime.traffic import Traffic
from ..runtime.variant import Variant
from ..runtime.wrapped import Wrapped
from ..workload import Workload
from .former import Former
from .options import KeepOriginal, Options, require_place
from .original import RELOAD, Residence
from .serving import Serving
from .status import State, Status
from .submit import Submissions, Submitted
from .tuning import Tuning
from .watch.breaker import Event
from .winner import Winner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..report import Report
    from ..tune.plan import Plan


class Handle(Wrapped):
    """`model.autotune`: the state of a wrapped model, and the operations on it.

    Attributes:
        options: the arguments of `wrap`.
    """

    def __init__(self, model: PreTrainedModel, options: Options) -> None:
        self.options = options
        self._model = model
        self._sharded = sharding.reason(model)
        traffic = Traffic()
        self._serving = Serving(model, traffic, share=options.watch, observe=lambda call: self._tuning.observe(call))
        self._winner = Winner(model, self._serving, traffic, cache=options.cache)
        self._tuning = Tuning(model, options, traffic, self._serving, self._winner)
        self._submissions = Submissions(model, self._serving.at_once)
        if options.when == "manual":
            by_all = f" on every rank: {self._sharded}" if self._sharded else ""
            self._serving.become(State.WAITING, f"tuning starts with .tune(){by_all}")
        else:
            self._serving.become(State.OBSERVING, f"tuning starts after {options.observe} calls")

    # What users call

    @property
    def status(self) -> Status:
        """The model's state: what serves, which calls the plan served, which it did not, and why."""
        serving, load = self._serving, self._load
        active, detail = serving.active, serving.detail
        return Status(
            state=serving.state,
            detail=self._tuning.again.said(detail) if serving.state is State.ORIGINAL else detail,
            transforms=tuple(map(str, active.transforms)) if active and serving.serves else (),
            served=serving.served,
            bypassed=dict(serving.bypassed),
            original=serving.original.place,
            speculation=active.speculation.tally if active and active.speculation else None,
            watch=serving.watch.summary() if active else "",
            batching=active.batching if active and serving.serves else "",
            waiting=self._submissions.waiting + load.waiting,
            load=load,
            resting=active is not None and serving.watch.open(),
        )

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a row or for their turn, as in `status`, which takes longer to ask for."""
        return self._submissions.waiting + self._load.waiting

    @property
    def _load(self) -> EngineLoad:
        active = self._serving.active
        return active.load if active else EngineLoad()

    @property
    def events(self) -> tuple[Event, ...]:
        """When and why the committed plan was taken out of service or put back; the latest 100 events."""
        return tuple(self._serving.watch.events)

    @property
    def active(self) -> Variant | None:
        """The variant that serves now; None: the original does."""
        return self._serving.active if self._serving.serves else None

    @property
    def given(self) -> Workload | None:
        """The workload that `wrap` or `tune` was given; None: none was given."""
        return self._tuning.given

    def live_request(self) -> AbstractContextManager[object]:
        return self._serving.live_request()

    @property
    def plan(self) -> Plan | None:
        """The plan that tuning found, whether committed or not; None before tuning."""
        tuned = self._winner.tuned
        return tuned.plan if tuned else None

    @property
    def fault(self) -> str | None:
        """Why the plan is out of service, in a sentence; None if it serves, or rests only because it seemed slow."""
        serving, tuned = self._serving, self._winner.tuned
        if tuned is None or not tuned.variant.transforms or serving.serves or serving.watch.is_slow:
            return None
        return f"{serving.state}: {serving.detail}"

    def report(self) -> Report:
        """Return the report on what was measured and decided.

        Raises:
            StateError: nothing was tuned yet.
        """
        if (tuned := self._winner.tuned) is None:
            state, detail = self._serving.state, self._serving.detail
            raise StateError(f"there is no report: the state is '{state}' ({detail}); call .tune() first")
        return tuned.report.with_calls(self._serving.served, dict(self._serving.bypassed))

    def tune(self, workload: Any = None) -> Report:
        """Tune now and commit the winner. Returns when done.

        If the model's layers are sharded over ranks, all ranks call it with the same workload.

        Args:
            workload: prompts as `wrap` takes them; default: those given to `wrap`, or the calls observed so far.

        Raises:
            WorkloadError: no prompts were given and none were observed, or they cannot be used.
            StateError: tuning is under way already, the original was released, the model is passed through, or this is
                within a call of the model.
        """
        self._winner.original.require("tune again")
        work = self._tuning.work(workload)
        with self._tuning.alone():
            self._winner.bring_back("tune again")
            self._tuning.run_here(work)
        return self.report()

    def adopt(self, plan: Plan) -> Former:
        """Verify another plan on this machine, beside the requests, and serve with it. Nothing is searched for.

        Returns:
            What served before, for `restore`.

        Raises:
            PlanError: it was made for another model, or does not hold here. What served before serves on.
            WorkloadError: no prompts were given to `wrap` and none were observed.
            StateError: tuning is under way, the original was released, the model is passed through or changed, or this
                is within a call of the model.
        """
        self._winner.original.require("verify another plan")
        work = self._tuning.work()
        with self._tuning.alone():
            self._winner.bring_back("verify another plan")
            return self._tuning.adopt(plan, work)

    def restore(self, former: Former) -> None:
        """Serve with what served before `adopt`, from the next call on. Calls under way finish as they began.

        Raises:
            StateError: the original's weights were released since.
        """
        self._winner.restore(former)

    def commit(self, *, keep_original: KeepOriginal = True) -> None:
        """Serve with the plan that was found (again, after a rollback).

        Args:
            keep_original: False permanently frees the original's weights that the plan does not use. The model stays
                the same object and serves as before. Calls that the plan cannot serve run through the plan's layers in
                transformers' loop. Rollback, unwrap, tuning and saving are no longer possible. "parked" moves the
                weights from the GPU to the host's memory instead; an operation that needs them moves them back. Waits
                for calls under way; after 5 s, new calls wait for it, each for a minute at most. Moves nothing if the
                plan uses all of the original's weights.

        Raises:
            StateError: there is no plan, the model changed since tuning, tuning under way needs the original,
                "parked" was asked for and the original is already in the host's memory, an experiment runs on the
                model, or weights would move within a call of it. Or the plan no longer serves by the time this has
                waited: it was rolled back, say.
            ValueError: `keep_original` is none of the three.
        """
        require_place(keep_original)
        tuned = self._winner.tuned
        if tuned is None:
            raise StateError("there is no plan to commit; call .tune() first")
        if change := self._serving.change():
            remedy = RELOAD if self._winner.original.place is Residence.RELEASED else "call .tune() again"
            raise StateError(f"the plan is stale: {change}; {remedy}")
        self._winner.serve(tuned)
        if keep_original is True:
            return
        if not self._tuning.lock.acquire(blocking=False):
            raise StateError("the original is needed while tuning is under way; wait for it, see .status")
        try:
            self._winner.send_away(park=keep_original == "parked")
        finally:
            self._tuning.lock.release()

    def rollback(self) -> None:
        """Serve with the original from the next call on. Calls under way finish with what they started with.

        Where nothing was tuned yet, the original serves already: nothing changes, and calls are observed as before.
        A commit without the original that still waits for calls is refused then.

        Raises:
            StateError: the original was released. Or its weights are parked and would move within a call of the model.
        """
        with self._winner.resident("roll back"):
            active, untuned = self._serving.active, (State.OBSERVING, State.WAITING, State.PASSED_THROUGH)
            if self._serving.state in untuned and not (active and active.transforms):
                return
            if self._serving.state is State.ORIGINAL and self._winner.tuned is None:  # the plan was dropped
                return
            self._serving.active = None
            self._serving.become(State.ROLLED_BACK, "the original serves; .commit() brings the plan back")

    def unwrap(self) -> PreTrainedModel:
        """Stop, and leave the model exactly as it was before `wrap`.

        Raises:
            StateError: the original was released, maybe while this waited for tuning to end; the plan serves on then.
                Or this is within a call of the model, for which tuning may be waiting, or parked weights would.
        """
        while True:
            self._winner.bring_back("unwrap")
            self._tuning.stop()
            if self._winner.original.place is Residence.RESIDENT:
                break
            self._tuning.resume()  # what was just ending has moved the weights
        self._serving.active = None
        route.detach(self._model)
        kernels.free_kept()
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
            StateError: the process ends, no thread can be started, or the model is sharded over ranks.
            WorkloadError: `input_ids` are not the token ids of one prompt, or an option does not suit one streamed
                sequence.
        """
        if self._sharded:
            raise StateError(f"requests cannot be submitted: {self._sharded}; call generate on all ranks in one order")
        return self._submissions.submit(input_ids, RequestTerms(priority, deadline_s, seed), options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy the handle as None, so that a copy of a passed-through model is a plain model."""
        return type(None), ()

    # What the routed model calls

    def sample(self, call: seam.Sampling) -> Any:
        return self._serving.sample(call)

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._serving.forward(model, args, kwargs)

    def other_loop(self, name: str) -> AbstractContextManager[object]:
        return self._serving.other_loop(name)

    # What `wrap` calls

    def start(self, work: Workload) -> None:
        """Tune for `work`, now or in the background."""
        self._tuning.start(work)

    def pass_through(self, reason: str) -> None:
        """Attach the handle but leave every call to the model, because its calls cannot be routed.

        Args:
            reason: why they cannot be routed, in words.
        """
        self._serving.become(State.PASSED_THROUGH, reason)
        self._tuning.problem = reason
        route.hold(self._model, self)
