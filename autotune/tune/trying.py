"""Takes one candidate from application to verdict. If it fails the quality gate, refines it: leaves out bad layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from ..diagnose.costs import Profile
from ..diagnose.diagnosis import Diagnosis
from ..errors import BudgetSpentError, DeviceError, TransformError
from ..machine import outside
from ..machine.hardware import Hardware
from ..model import sharding
from ..runtime.variant import Transform, Variant
from ..transforms import is_foreign
from ..validate import Latency, Quality, Verdict
from ..workload import PHASES, Phase, Target
from .assembly import NeededError, assemble
from .choose import SearchState, exchange, expect, promise, tier_for
from .plan import Confirmation, Trial, TrialOutcome
from .policy import Policy
from .refine import Probe, Promises, Refinement, narrowest, refine
from .verdict import UNTRIED

log = logging.getLogger("autotune")

T = TypeVar("T")

MIN_FIRST_SPEEDUP = 0.1  # a candidate slower than this in its first run is dropped before the costly quality exam
REFINING_SHARE = 0.15  # share of the budget for finding out which layers of one transform to leave wider
LEAST_S = 10.0  # least seconds that a candidate gets in a child process, even if less of the budget is left
OUTCOMES = {
    Verdict.PASS: TrialOutcome.ACCEPTED,
    Verdict.FAIL: TrialOutcome.REJECTED,
    Verdict.INCONCLUSIVE: TrialOutcome.INCONCLUSIVE,
    Verdict.ERROR: TrialOutcome.ERROR,
}


class Bench(Protocol):
    """Everything the search has to measure."""

    def begin(self, budget_s: float, deadline: float) -> None:
        """Take note of the budget, seconds, and of the clock's value at which it is spent."""

    def profile(self, variant: Variant) -> Profile: ...

    def diagnose(self, profile: Profile) -> Mapping[Phase, Diagnosis]: ...

    def memory_ratio(self, variant: Variant) -> float:
        """Bytes held by the original and the variant together / bytes held by the original."""

    def first_speedup(self, incumbent: Variant, candidate: Variant, phase: Phase) -> float:
        """Speed-up of `phase` from very short runs of each, to reject hopeless candidates early."""

    def risk(self, transform: Transform, make: Callable[[], Variant], most_s: float) -> str | None:
        """Make and run a candidate in a child process first. Returns how it killed or hung the process, or None."""

    def judge(self, variant: Variant, tier: str) -> Quality:
        """Quality against the original.

        Raises:
            BudgetSpentError: the budget ended.
        """

    def probe(self, incumbent: Variant, transform: Transform, tier: str) -> Probe | None:
        """Return the probe that finds the layers a transform ruins; None if it cannot leave out layers."""

    def race(self, incumbent: Variant, candidate: Variant, target: Target) -> Latency:
        """Paired latency of a phase, or of whole requests."""

    def confirm(self, variant: Variant, *, brief: bool = True) -> Confirmation:
        """Compare a variant with the original, on prompts it was not chosen on.

        Args:
            brief: whether fewer prompts are enough if the budget is too short for all.

        Raises:
            BudgetSpentError: the budget ended.
        """

    def least_s(self, profile: Profile) -> float:
        """Least seconds to judge, time and confirm a candidate, from the original's profile."""

    @property
    def race_s(self) -> float:
        """Least seconds of a race, from the original's profile."""

    def free_bytes(self) -> float:
        """Free memory of the device, bytes."""

    def describe_error(self, error: Exception) -> str:
        """Describe an error of a candidate. Raises DeviceError if the error means that the device is dead."""

    def free_memory(self) -> None:
        """Free the memory of a candidate that was not kept."""


@dataclass(frozen=True)
class Trier:
    """Tries candidates against an incumbent.

    Args:
        budget_s: the budget, seconds.
        deadline: value of `clock` at which it is spent.
        faults: transform -> what it raised when it was last asked something.
    """

    policy: Policy
    hardware: Hardware
    bench: Bench
    notify: Callable[[str], None]
    clock: Callable[[], float]
    budget_s: float
    deadline: float
    faults: dict[Transform, str] = field(default_factory=dict)

    def ask(self, transform: Transform, question: Callable[[], T]) -> T | None:
        """Return the answer to a question that a transform is asked; None if it raises, which `faults` then says.

        Raises:
            DeviceError: the device is dead.
        """
        self.faults.pop(transform, None)
        try:
            return question()
        except DeviceError:
            raise
        except Exception as error:  # a transform is foreign code, before its trial, too
            outside.pass_on(error)
            log.debug("%s could not be considered", transform, exc_info=True)
            self.faults[transform] = f"it could not be considered: {self.bench.describe_error(error)}"
            return None

    def lateness(self, needed_s: float = 0.0) -> str | None:
        """Why there is too little time left to begin work of `needed_s` seconds, or None."""
        left_s, budget = self.deadline - self.clock(), f"the budget of {self.budget_s:.0f} s"
        if left_s <= 0:
            return f"{budget} was spent"
        return None if needed_s <= left_s else f"it takes about {needed_s:.0f} s, {left_s:.0f} s of {budget} were left"

    def attempt(
        self, trial: Trial, incumbent: Variant, made: list[Variant] | None = None, *, held_out: bool = False
    ) -> tuple[Trial, Variant | None]:
        """Take one candidate from application to verdict, and measure the time that takes.

        Args:
            made: holds the candidate if it is built already; emptied, because nothing else may keep its memory alive.
            held_out: whether it is proven on held-out prompts directly.
        """
        start = self.clock()
        trial, candidate = self._judge(trial, incumbent, made, held_out)
        trial = replace(trial, seconds=self.clock() - start)
        self.notify(f"{trial.outcome} {trial.candidate}: {trial.reason}")
        return trial, candidate

    def refine(
        self, failed: Trial, state: SearchState, base: SearchState, others: float
    ) -> tuple[list[Trial], Variant | None]:
        """Try a transform that failed the gate without the layers that made it fail, if these are few enough.

        Args:
            failed: the trial of the whole transform.
            state: the state that it was tried on.
            base: what its layers are compared on: `state`, or the original if it was to replace another transform.
            others: speed-up that the step's next choice promises; a refined transform has to promise more.

        Returns:
            The trials to record, of which the last decides, and the last one's variant.
        """
        start = self.clock()
        try:
            found = self._look_into(failed, state, base, others)
        except DeviceError:
            raise
        except Exception as error:  # foreign code is measured, as in a trial
            outside.pass_on(error)
            log.debug("%s could not be refined", failed.transform, exc_info=True)
            found = Refinement((), f"its layers could not be compared: {self.bench.describe_error(error)}")
        if found is None:
            return [failed], None
        seconds = failed.seconds + self.clock() - start
        trials = [replace(failed, reason=f"{failed.reason}; {found.finding}", seconds=seconds)]
        candidate = None
        for proposal in found.proposals:
            refined = replace(failed, transform=proposal.transform, predicted=proposal.predicted, quality=None)
            if late := self.lateness():
                refined = replace(refined, outcome=TrialOutcome.UNREACHED, reason=late, seconds=0.0, compile_s=0.0)
                return [*trials, refined], None
            trial, candidate = self.attempt(refined, state.variant)
            if trial.outcome in UNTRIED:
                return [*trials, trial], candidate
            trials.append(replace(trial, reason=f"{proposal.reason}; {trial.reason}"))
            if trial.quality is None or trial.quality.verdict is Verdict.PASS:
                break
        return trials, candidate

    def _look_into(self, failed: Trial, state: SearchState, base: SearchState, others: float) -> Refinement | None:
        """Find the layers that made a transform fail, and what to try without them; None if that is not possible."""
        tier = failed.quality.tier if failed.quality else self.policy.tier
        if failed.target == "both":
            return None
        if (probe := narrowest(failed.transform, lambda form: self.bench.probe(base.variant, form, tier))) is None:
            return None
        self.notify(f"looking for the layers that make {failed.transform} fail")
        replaced, wide = next(iter(failed.instead_of), None), 1.0  # by default, a wider layer is the original's
        if probe.wider is not None:
            wide = promise(probe.wider, failed.target, state, self.hardware, replaced=replaced, before=base) or 1.0
        elif replaced is not None:
            wide = exchange(1.0, expect(replaced, failed.target, base, self.hardware), failed.target, base, state)
        promises = Promises(failed.predicted or 1.0, wide, max(1 + self.policy.limits.min_gain, others))
        end = min(self.deadline, self.clock() + REFINING_SHARE * self.budget_s)
        return refine(probe, promises, spent=lambda: self.clock() >= end)

    def _judge(
        self, trial: Trial, incumbent: Variant, made: list[Variant] | None, held_out: bool
    ) -> tuple[Trial, Variant | None]:
        """Judge one candidate. If it raises, the incumbent stays as it was and the candidate's memory is freed.

        Raises:
            DeviceError: the device is dead for this process, so no further trial is possible.
        """
        candidate = None
        try:
            for stage in self._stages(trial, incumbent, made, held_out):
                trial, candidate = stage
        except DeviceError:
            raise
        except Exception as error:  # a transform is foreign code: its crash must cost only the candidate
            outside.pass_on(error)
            log.debug("%s crashed", trial.candidate, exc_info=True)
            trial, candidate = replace(trial, outcome=TrialOutcome.ERROR, reason=self.bench.describe_error(error)), None
        if candidate is None:  # no exception is alive now, whose traceback would keep its memory
            self.bench.free_memory()
        return trial, candidate

    def _stages(
        self, trial: Trial, incumbent: Variant, made: list[Variant] | None, held_out: bool
    ) -> Iterator[tuple[Trial, Variant | None]]:
        """Take one candidate from application to verdict, and yield the trial as known after each stage.

        The candidate is yielded only with the verdict that keeps it; before that, None is. Raises what the candidate
        raises.
        """
        trial, candidate = self._applied(trial, incumbent, made)
        yield trial, None
        if candidate is None:
            return
        if (reason := self._hopeless(trial, incumbent, candidate)) is not None:
            yield replace(trial, outcome=TrialOutcome.REJECTED, reason=reason), None
            return
        try:
            found = self._examined(candidate, held_out)
        except BudgetSpentError as error:
            yield replace(trial, outcome=TrialOutcome.UNREACHED, reason=str(error)), None
            return
        yield (trial := _decided(trial, found)), candidate if held_out and found.holds else None
        quality = found.quality
        if held_out or quality is None or quality.verdict is not Verdict.PASS:
            return
        if late := self.lateness(2 * self.bench.race_s):  # and one to confirm
            reason = f"it is no worse, and was not timed: {late}"
            yield replace(trial, outcome=TrialOutcome.UNREACHED, reason=reason), None
            return
        latency = self.bench.race(incumbent, candidate, trial.target)
        yield _decided(trial, Confirmation(quality=quality, latency=latency)), candidate

    def _applied(self, trial: Trial, incumbent: Variant, made: list[Variant] | None) -> tuple[Trial, Variant | None]:
        """Build the candidate. Returns the trial as known then, and no candidate if it cannot be tried."""
        start = self.clock()
        for foreign in filter(is_foreign, trial.transforms):
            most_s = max(LEAST_S, self.deadline - start)
            if death := self.bench.risk(foreign, lambda: assemble(trial, incumbent), most_s):
                return replace(trial, outcome=TrialOutcome.ERROR, reason=death), None
        try:
            candidate = made.pop() if made else assemble(trial, incumbent)
            with sharding.alone(candidate.original):
                missing = next(filter(None, (t.took_effect(candidate) for t in trial.transforms)), None)
        except TransformError as error:
            outcome = TrialOutcome.UNAVAILABLE if isinstance(error, NeededError) else TrialOutcome.BLOCKED
            return replace(trial, outcome=outcome, reason=str(error)), None
        trial = replace(trial, compile_s=self.clock() - start)
        if missing is not None:
            return replace(trial, outcome=TrialOutcome.BLOCKED, reason=f"it had no effect: {missing}"), None
        return trial, candidate

    def _hopeless(self, trial: Trial, incumbent: Variant, candidate: Variant) -> str | None:
        """Why a candidate is rejected before the costly quality exam, or None: its memory, or its first run."""
        memory, limit = self.bench.memory_ratio(candidate), self.policy.limits.max_memory_ratio
        if memory > limit:
            return f"weights would take {memory:.2f}x the original's memory, {limit:.2f}x is allowed"
        for phase in PHASES if trial.target == "both" else (trial.target,):
            if (first := self.bench.first_speedup(incumbent, candidate, phase)) < MIN_FIRST_SPEEDUP:
                return f"the first run of {phase} took {1 / first:.1f}x as long"
        return None

    def _examined(self, candidate: Variant, held_out: bool) -> Confirmation:
        if held_out:
            return self.bench.confirm(candidate, brief=False)
        return Confirmation(quality=self.bench.judge(candidate, tier_for(candidate, self.policy)))


def _decided(trial: Trial, found: Confirmation) -> Trial:
    """Return the trial with the measurements made so far and the outcome they mean."""
    quality, latency = found.quality, found.latency
    if latency is not None:
        outcome = TrialOutcome.INCONCLUSIVE if latency.drowned else OUTCOMES[latency.verdict]
    elif quality is not None:
        outcome = OUTCOMES[quality.verdict] if quality.examined else TrialOutcome.BLOCKED
    else:
        outcome = TrialOutcome.ERROR
    return replace(trial, quality=quality, latency=latency, outcome=outcome, reason=found.reason)
