"""Shadow: the control answers every live call. Candidates replay a sample of the calls afterwards, off the path."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import DeviceError, ExperimentError, MeasurementError
from ...machine import ending, forking
from ...machine.ending import Cancelled
from ...model import modes, route, seam
from ...runtime.traffic import Traffic
from ...runtime.wrapped import serving_variant
from ...validate import Verdict
from ...validate.tiers import TIERS
from . import guardrails
from .guardrails import Guardrail, stated_bound
from .live import (
    Layer,
    LiveState,
    LiveStatus,
    Record,
    Standing,
    log,
    read_figures,
    sentences,
    spread_of,
)
from .replays import LateError, Replay, ReplayedRequest, Rerun, Turns, replay
from .sequential import Moments

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedModel

    from ...validate.timing import Clock
    from .setup import Setup

ALPHA = 0.05  # chance of ever making a false statement about a candidate
MAX_ERRORS = 0.02  # share of replays that may fail
MAX_DIVERGENT = 0.05  # share of requests whose mean KLD may exceed the tier's limit for single tokens
KEPT_ERRORS = 5  # latest error messages that are kept
JOIN_S = 30.0  # seconds that `stop` waits for the replay under way; live calls do not wait


def limits_of(experiment: Setup) -> tuple[Guardrail, ...]:
    """The limits for a candidate in a shadow, from the experiment's tier and limits."""
    tier = TIERS[experiment.tier]
    return (
        Guardrail("errors", "rate", MAX_ERRORS),
        Guardrail("divergent", "rate", MAX_DIVERGENT),
        Guardrail("kld", "mean", tier.mean_kld),
        Guardrail("ttft", "ratio", max(0.0, experiment.limits.max_ttft_increase)),
        Guardrail("tpot", "ratio", max(0.0, experiment.limits.max_tpot_increase)),
    )


class Shadow(Layer):
    """Candidates beside live traffic. Begins when entered or started; the model is unchanged when it ends.

    A live call gets the control's answer. If it is sampled, its ids are copied once. Replays run in one thread, only
    while no live call is in flight, and pause before every token for live calls. Under traffic without gaps nothing is
    replayed: the queue fills, and further calls are dropped and counted.

    Args:
        experiment: the experiment; all of its candidates run.
        model: the live model, wrapped or not, which is the control.
        share: share of live calls that are sampled to be replayed.
        queue: most sampled calls that wait.
        deadline_s: most seconds from an answer to the end of its replay; later replays are dropped.
        budget: share of the time since the start that replays may take.
        budget_s: most seconds that replays may take altogether.
        seed: seed of the sampling and of the order of arms; the process's random numbers are not used.
        clock: returns monotonic seconds.

    Raises:
        ExperimentError: a candidate cannot be run, or a number makes no sense.
    """

    def __init__(
        self,
        experiment: Setup,
        model: PreTrainedModel,
        *,
        share: float = 0.05,
        queue: int = 16,
        deadline_s: float = 60.0,
        budget: float = 0.1,
        budget_s: float = math.inf,
        seed: int = 0,
        clock: Clock = time.perf_counter,
    ) -> None:
        if not (0 < share <= 1 and queue >= 1 and deadline_s > 0 and 0 < budget <= 1 and budget_s > 0):
            raise ExperimentError(
                f"share={share}, queue={queue}, deadline_s={deadline_s}, budget={budget}, budget_s={budget_s}: "
                "expected shares above 0 and at most 1, and at least one place in the queue and some time"
            )
        super().__init__(experiment, model, list(experiment.candidates))
        self.name = experiment.name
        self.limits = limits_of(experiment)
        self._tier = TIERS[experiment.tier]
        self._share = share
        self._places = queue
        self._deadline_s = deadline_s
        self._clock = clock
        self._budget = budget
        self._budget_s = budget_s
        self._chance = random.Random(seed)  # noqa: S311 - which calls are sampled is no secret
        self._traffic = Traffic()
        self._changed = forking.free(threading.Condition())
        self._waiting = deque[ReplayedRequest]()
        self._busy = False
        self._state = LiveState.STOPPED
        self._spent_s = 0.0
        self._start_s = clock()
        self._requests = 0
        self._counts = Counter[str]()
        self._thread: ending.Worker | None = None
        settings = {"tier": experiment.tier, "limits": [[g.name, g.limit] for g in self.limits]}
        self._record = Record(experiment, "shadow", self._control_arm, self._arms, settings)
        self._figures = {name: self._restored(name) for name in self._arms}
        self._errors: dict[str, deque[str]] = {name: deque(maxlen=KEPT_ERRORS) for name in self._arms}
        self._tallies: dict[str, Counter[str]] = {name: Counter() for name in self._arms}

    def _restored(self, name: str) -> dict[str, Moments]:
        return read_figures(self._record.load(name))

    # What users call

    def start(self) -> Self:
        """Begin to sample live calls."""
        if self._thread is not None:
            raise ExperimentError(f"the shadow {self.name!r} was started before; make another one")
        before, self._state = self._state, LiveState.RUNNING
        self._start_s = self._clock()
        self._thread = ending.Worker(self._work, f"autotune shadow {self.name}", stop=self._call_off)
        try:
            self._thread.launch()
        except ending.NoThreadError as error:
            self._thread, self._state = None, before
            raise ExperimentError(
                f"no thread can replay calls: {error}; end other threads, or raise their limit"
            ) from error
        forking.tell(self)
        route.add_layer(self._model, self)
        return self

    def stop(self) -> None:
        """End, and leave the model unchanged. Saves the measurements and drops waiting calls."""
        route.remove_layer(self._model, self)
        self._call_off()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_S)
            if self._thread.is_alive():
                log.warning("the shadow %s ended, but a candidate hangs in a replay", self.name)
        self._record.save(self.status, self._figures)

    def _call_off(self) -> None:
        with self._changed:
            self._state = LiveState.STOPPED
            self._counts["dropped: stopped"] += len(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        self._traffic.cancel()

    def after_fork(self) -> None:
        """Stop sampling in a forked child: the replaying thread exists only in the parent."""
        route.remove_layer(self._model, self)
        self._call_off()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all sampled calls were replayed or dropped. Returns whether that took less than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    @property
    def status(self) -> LiveStatus:
        """The current status; valid however often it is read."""
        with self._changed:
            standings = tuple(map(self._standing, self._arms))
            return LiveStatus(self.name, "shadow", self._state, self._requests, dict(self._counts), standings)

    def _standing(self, name: str) -> Standing:
        figures, alpha = self._figures[name], ALPHA / len(self.limits)
        found = [guardrails.judge(rail, None, figures.get(rail.name, Moments()), alpha) for rail in self.limits]
        verdict, reason = guardrails.conclude(found)
        if self._state is LiveState.FAILED and verdict is not Verdict.FAIL:
            verdict, reason = Verdict.ERROR, "the device failed"
        return Standing(
            name=name,
            description=self._arms[name].description,
            verdict=verdict.value,
            reason=reason,
            requests=figures.get("errors", Moments()).n,
            share=0.0,
            findings=sentences(found),
            bounds=tuple(stated_bound(rail, alpha, std=spread_of(figures, rail.name)) for rail in self.limits),
            errors=tuple(self._errors[name]),
            counts=dict(self._tallies[name]),
        )

    # What the routed model calls

    def sample(self, call: seam.Sampling) -> Any:
        with self._traffic.request():  # only counts the call; live calls never wait for a replay
            result = self.control(call)
        try:
            self._offer(call, result)
        except Exception as error:  # the experiment must not cost the caller the answer
            log.warning("a live call was not sampled: %s: %s", type(error).__name__, error)
        return result

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._traffic.request():
            return super().forward(model, args, kwargs)

    @contextmanager
    def other_loop(self, name: str) -> Iterator[None]:
        with self._traffic.request(), super().other_loop(name):
            yield

    # How it works

    def _offer(self, call: seam.Sampling, result: Any) -> None:
        with self._changed:
            self._requests += 1
            if self._state is not LiveState.RUNNING or self._chance.random() >= self._share:
                return
            self._counts["sampled"] += 1
            if (reason := self._hindrance(call)) is not None:
                self._counts[f"dropped: {reason}"] += 1
                return
            self._waiting.append(ReplayedRequest.of(call, result, self._clock()))
            self._changed.notify_all()

    def _hindrance(self, call: seam.Sampling) -> str | None:
        """Why a call is not copied, or None."""
        if reason := call.unusual_argument() or modes.unserved():
            return reason
        return "queue full" if len(self._waiting) >= self._places else None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._state is not LiveState.RUNNING)
                if self._state is not LiveState.RUNNING:
                    return
                request, self._busy = self._waiting.popleft(), True
                dropped = self._obstacle(request)
            try:
                if dropped is None:
                    dropped = self._replay_on_all(request)
            except Cancelled:
                dropped = "stopped"
            except DeviceError as error:
                log.warning("the shadow %s ends: %s", self.name, error)
                with self._changed:
                    self._state = LiveState.FAILED
            except Exception as error:  # the experiment's error must not affect the live model
                dropped = f"{type(error).__name__}: {error}"
                log.warning("a replay of the shadow %s failed: %s", self.name, dropped)
            if dropped is not None:
                with self._changed:
                    self._counts[f"dropped: {dropped}"] += 1

    def _obstacle(self, request: ReplayedRequest) -> str | None:
        now = self._clock()
        if now - request.at_s > self._deadline_s:
            return "deadline"
        if self._spent_s > min(self._budget * (now - self._start_s), self._budget_s):
            return "budget"
        handle = self._model.__dict__.get(route.SLOT)
        return "tuning" if getattr(getattr(handle, "status", None), "state", "") == "tuning" else None

    def _replay_on_all(self, request: ReplayedRequest) -> str | None:
        """Replay on every candidate. Returns why the request was dropped, or None."""
        if not request.served()[0]:
            return "empty answer"
        if change := self.change():
            return change
        start = self._clock()
        turns = Turns(self._traffic, request.at_s + self._deadline_s, self._clock)
        control = Rerun(serving_variant(self._model), turns, request.pad_token_id)
        try:
            for name, arm in self._arms.items():
                assert arm.variant is not None  # noqa: S101 - `arms_of` refuses others; for the type checker
                candidate = Rerun(arm.variant, turns, request.pad_token_id)
                first = self._chance.random() < 0.5
                found = replay(control, candidate, request, turns, candidate_first=first)
                if change := self.change():
                    return change
                self._count(name, found)
        except LateError:
            return "deadline"
        except MeasurementError as error:
            return str(error)
        finally:
            self._spent_s += self._clock() - start
        self._record.save(self.status, self._figures)
        return None

    def _count(self, name: str, found: Replay) -> None:
        with self._changed:
            if found.left is not None:
                self._tallies[name][f"left to the control: {found.left}"] += 1
                return
            self._figures[name] = guardrails.add(self._figures[name], self._values(found))
            tally = self._tallies[name]
            if found.error is not None:
                self._errors[name].append(found.error)
                tally["failed"] += 1
            else:
                tally["same tokens" if found.diverged is None else "diverged"] += 1

    def _values(self, found: Replay) -> dict[str, float | None]:
        by = {rail.name: rail for rail in self.limits}
        values: dict[str, float | None] = {"errors": float(found.error is not None)}
        if found.error is None:
            values |= {"divergent": float(found.kld > self._tier.p99_kld), "kld": found.kld}
        if found.pair is not None and not found.pair.polluted:
            for name in ("ttft", "tpot"):
                there, here = (getattr(t, f"{name}_s") for t in (found.pair.candidate, found.pair.reference))
                values[name] = by[name].scale(there / here)
        return values
