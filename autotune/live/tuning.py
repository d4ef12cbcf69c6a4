"""When a wrapped model is tuned: on a caller's behalf, after some observed calls, or in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from .. import workload
from ..errors import StateError, WorkloadError, first_line
from ..machine import device as devices
from ..machine import ending, forking, intraop
from ..machine.ending import Cancelled
from ..model import configured, route, seam, stateful
from ..model.revision import Revision
from ..report.progress import Doing, said
from ..runtime.traffic import WITHIN, Traffic
from ..runtime.variant import Variant
from ..workload import Observer, Workload
from .again import Again
from .status import State

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..tune.plan import Plan
    from .former import Former
    from .options import Options
    from .serving import Serving
    from .winner import Winner

log = logging.getLogger("autotune")

CALLED_OFF = "tuning was called off: the model was unwrapped, or the process ends"


class Tuning:
    """Tunes a wrapped model, one search at a time, and puts the winner into service.

    Args:
        model: the wrapped model.
        options: of `wrap`.
        traffic: in which every call takes part.
        serving: routes the model's calls.
        winner: what tuning found.

    Attributes:
        lock: held while the model is tuned.
        thread: the thread that tunes in the background; None if none was needed.
        given: the workload that `wrap` or `tune` was given.
        problem: why the model cannot be tuned; None if it can.
        again: searches that are repeated later.
    """

    def __init__(
        self, model: PreTrainedModel, options: Options, traffic: Traffic, serving: Serving, winner: Winner
    ) -> None:
        self._model = model
        self._options = options
        self._traffic = traffic
        self._serving = serving
        self._winner = winner
        self._notify = options.progress or log.info
        self._quiet = options.progress is None
        self._observer = Observer(configured.context(model))
        self.given: Workload | None = None
        self.lock = forking.lock()
        self.thread: threading.Thread | None = None
        self.problem: str | None = None
        self.again = Again(traffic.rest)
        forking.tell(self)

    def after_fork(self) -> None:
        """Reset the state in a forked child: a thread of the parent tunes on, but only in the parent."""
        if self._serving.state is State.TUNING:
            state = State.WAITING if self._options.when == "manual" else State.OBSERVING
            detail = "it was being tuned in the process that this one was forked from; this one may tune again"
            self._serving.become(state, detail)

    def read(self, value: Any) -> Workload:
        """The workload that `wrap` or `tune` was given."""
        return workload.read(value, tokenizer=self._options.tokenizer, model=self._model)

    def work(self, given: Any = None) -> Workload:
        """What to tune for: the given prompts, or the calls observed so far.

        Raises:
            WorkloadError: no prompts were given and none were observed, or they cannot be used.
            StateError: the model is passed through.
        """
        if self.problem is not None:
            raise StateError(self.problem)
        if given is not None:
            self.given = self.read(given)
        if self.given is None and not self._observer.ready(1):
            raise WorkloadError("nothing to tune for: no call was observed yet; pass prompts, .tune(workload=[...])")
        return self.given or self._observer.workload()

    def stop(self) -> None:
        """Call off tuning and wait until its thread has ended, and a step of another thread that is in progress.

        Raises:
            StateError: this is within a call of the model, for which the thread may be waiting.
        """
        others = self.thread if self.thread is not threading.current_thread() else None
        if others is not None and others.is_alive() and self._traffic.is_inside():
            raise StateError(WITHIN)
        self._traffic.cancel()
        if others is not None:
            others.join()
        self._traffic.settle()

    def resume(self) -> None:
        """Make tuning possible again after `stop`."""
        self._traffic.resume()

    # On behalf of a caller, who gets the errors

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold this context while this thread alone tunes.

        Raises:
            StateError: tuning is under way, or this is within a call of the model.
        """
        if self._traffic.is_inside():
            raise StateError(WITHIN)
        if not self.lock.acquire(blocking=False):
            raise StateError("tuning is under way already; wait for it, see .status")
        self.again.drop()
        try:
            yield
        finally:
            self.lock.release()
            intraop.rest()

    def run_here(self, work: Workload) -> None:
        """Tune now. Hold `alone`."""
        try:
            self._run(work)
        except Cancelled:
            raise StateError(CALLED_OFF) from None

    def adopt(self, plan: Plan, work: Workload) -> Former:
        """Verify a plan and serve with it. Returns what served before. Hold `alone`."""
        from ..tune.run import verified

        options, revision = self._options, Revision(self._model)
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
        return self._winner.replaced(tuned, revision, is_adopted=True)

    # On behalf of live calls, which an error must not fail

    def start(self, work: Workload) -> None:
        """Tune for `work`, now or in the background."""
        self.given = work
        if self._options.when == "blocking":
            with self.lock:
                self.run_here(work)
        elif self._options.when == "background" and self.lock.acquire(blocking=False):
            try:
                self._spawn(work)
            except ending.NoThreadError as error:  # the model serves all the same
                self._serving.say(f"tuning could not begin: {error}", "call .tune() later")

    def observe(self, call: seam.Sampling) -> None:
        """Take note of a call that no plan served, and tune once there are enough of them."""
        if self._serving.state not in (State.OBSERVING, State.WAITING):
            return
        try:
            self._consider(call)
        except Exception as error:  # the call was answered; observing it is optional
            log.warning("a call was not observed: %s: %s", type(error).__name__, error)

    def _consider(self, call: seam.Sampling) -> None:
        self._observer.observe(call.input_ids, call.mask, call.longest - call.input_ids.shape[1])
        if self._options.when == "manual" or not self._observer.ready(self._options.observe):
            return
        work = self._observer.workload()  # may raise, so before the lock
        if not self.lock.acquire(blocking=False):
            return
        if self._options.when == "blocking":
            self._run_and_unlock(work)
        else:
            self._spawn(work)

    def _spawn(self, work: Workload) -> None:
        self._serving.become(State.TUNING, "started")
        repeat = partial(self.again.keep_trying, WeakMethod(self._tune_by_itself), work)
        worker, launched = ending.Worker(repeat, "autotune", stop=self._traffic.cancel), False
        try:
            launched = worker.launch()
        finally:  # where no thread can be started, it raises
            if launched:
                self.thread = worker
            else:
                self._serving.become(State.OBSERVING, "no thread could be started, or the process ends")
                self.lock.release()

    def _tune_by_itself(self, work: Workload, again: bool) -> bool:
        """Tune in the background. Returns whether noise may have hidden a gain.

        Args:
            work: what to tune for.
            again: whether this is a repeated try, which is skipped if the state or the model has changed since.
        """
        serving = self._serving
        if again and not (
            serving.state is State.ORIGINAL and serving.change() is None and self.lock.acquire(blocking=False)
        ):
            return False
        self._run_and_unlock(work)
        tuned = self._winner.tuned
        return serving.state is State.ORIGINAL and tuned is not None and tuned.noisy

    def _run_and_unlock(self, work: Workload) -> None:
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
            self.lock.release()

    # The search

    def _run(self, work: Workload) -> None:
        from ..tune.run import tune

        options = self._options
        self._serving.become(State.TUNING, "started")
        try:
            stateful.forget(self._model)
            revision = Revision(self._model)
            tuned = tune(
                route.bare(self._model),
                work,
                options.policy,
                tokenizer=options.tokenizer,
                draft=options.draft,
                cache=options.cache,
                plan=options.plan,
                traffic=self._traffic,
                notify=self._progress,
                serve=partial(self._serve_meanwhile, revision),
            )
        except Cancelled:
            self._serving.active = None
            self._serving.become(State.ORIGINAL, CALLED_OFF)
            raise
        except BaseException as error:
            self._serving.fail(f"{type(error).__name__}: {error}")
            raise
        devices.of(self._model).trim()  # frees the memory that measuring and judging used
        if change := revision.differs():
            said = f"the model changed while it was being tuned ({change}); call .tune() again"
            self._serving.fail(said)
            raise StateError(said)
        self._winner.replaced(tuned, revision)
        if self._quiet and tuned.doubt is not None:  # a progress callback got this message already
            log.warning("%s. This is not kept as a plan: %s", tuned.verdict, tuned.doubt)
        if options.keep_original is True:
            return
        try:
            self._winner.send_away(park=options.keep_original == "parked")
        except StateError as refusal:  # the plan was found all the same
            log.warning("the original stays beside the plan: %s", refusal)
        except Exception as error:
            if devices.of(self._model).failure(error) != "memory":
                raise
            log.warning("the original stays beside the plan: no room to move its weights: %s", first_line(error))

    def _serve_meanwhile(self, revision: Revision, variant: Variant) -> None:
        """Serve with a proven variant while tuning goes on, unless the model changed or was rolled back meanwhile."""
        if self._serving.state is State.TUNING and revision.differs() is None:
            self._serving.revision = revision
            self._serving.begin(variant, None)

    def _progress(self, step: str) -> None:
        self._serving.detail = said(step)
        if not (self._quiet and isinstance(step, Doing) and step.share):  # a log shows steps, not shares
            self._notify(step)
