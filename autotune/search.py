"""The search: diagnose, propose, try, validate, keep.

It is written over a `Bench`, which measures, so that its logic runs on scripted numbers in milliseconds.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from . import architecture, outside, rehearsal, transforms
from .diagnose import Diagnosis
from .errors import DeviceError, TransformError
from .hardware import Hardware
from .plan import Outcome, Trial
from .policy import Choice, Limits, Policy, Step
from .profile import Profile
from .sensitivity import Probe, Promises, Refinement, refine
from .transforms import Blocker, Transform
from .transforms.linears import reusing
from .validate import Latency, Quality, Verdict
from .variant import Variant
from .verdict import UNTRIED
from .workload import Phase

log = logging.getLogger("autotune")

HOPELESS = 0.1  # speed-up of a first run below which not even quality, which is judged first, is worth the time
REFINING_SHARE = 0.15  # of the budget that may go into finding out which layers of one transform to leave wider
LEAST_S = 10.0  # that a candidate may take to show in a child process whether it ends, however little time is left
ROOM = 0.9  # of the free memory: activations and the allocator's slack want the rest
OUTCOMES = {
    Verdict.PASS: Outcome.ACCEPTED,
    Verdict.FAIL: Outcome.REJECTED,
    Verdict.INCONCLUSIVE: Outcome.INCONCLUSIVE,
    Verdict.ERROR: Outcome.ERROR,
}


class Bench(Protocol):
    """Everything the search has to measure."""

    def profile(self, variant: Variant) -> Profile: ...

    def diagnose(self, profile: Profile) -> Mapping[Phase, Diagnosis]: ...

    def memory_ratio(self, variant: Variant) -> float:
        """Bytes held by the original and the variant together / bytes held by the original."""

    def glance(self, incumbent: Variant, candidate: Variant, phase: Phase) -> float:
        """Speed-up of `phase` from a single run of each: enough to turn down what is hopeless."""

    def risk(self, incumbent: Variant, transform: Transform, most_s: float) -> str | None:
        """What a candidate did to a child process that tried it first, where foreign code is to be feared; or None."""

    def judge(self, variant: Variant, tier: str) -> Quality:
        """Quality against the original."""

    def probe(self, incumbent: Variant, transform: Transform, tier: str) -> Probe | None:
        """What finds out which layers a transform ruins; None where it cannot leave out some."""

    def race(self, incumbent: Variant, candidate: Variant, phase: Phase) -> Latency:
        """Paired latency of `phase`."""

    def free_bytes(self) -> float:
        """Memory of the device that is still to be had."""

    def explain(self, error: Exception) -> str:
        """What a candidate raised, in words; raises DeviceError where it means that the device is dead."""

    def tidy(self) -> None:
        """Give back the memory of a candidate that was not kept."""


@dataclass(frozen=True)
class State:
    """The best variant so far and what is known of it.

    Args:
        obstacle: why no transform can be had on this model, whatever it is, or None.
    """

    variant: Variant
    profile: Profile
    diagnoses: Mapping[Phase, Diagnosis]
    free_bytes: float = math.inf
    obstacle: str | None = None


@dataclass(frozen=True)
class Found:
    """What a search came to: the original, the best variant, and everything considered on the way."""

    before: State
    after: State
    trials: tuple[Trial, ...]


@dataclass
class _Search:
    policy: Policy
    hardware: Hardware
    bench: Bench
    notify: Callable[[str], None]
    clock: Callable[[], float]
    deadline: float
    obstacle: str | None = None
    trials: list[Trial] = field(default_factory=list)

    def examine(self, variant: Variant) -> State:
        profile = self.bench.profile(variant)
        diagnoses, free_bytes = self.bench.diagnose(profile), self.bench.free_bytes()
        return State(variant, profile, diagnoses, free_bytes, self.obstacle)

    def take(self, step: Step, state: State) -> State:
        """Try a step's choices, the most promising first; each that is kept changes what the rest can promise."""
        choices = [make(choice) for choice in step.choices]
        while choices:
            predicted = {t: promise(t, step.phase, state, self.hardware) for t in choices}
            transform = max(choices, key=lambda t: predicted[t] or 0.0)
            choices.remove(transform)
            trial = Trial(transform, step.name, step.phase, Outcome.SKIPPED, "", predicted=predicted[transform])
            candidate = None
            if ruled_out := rule_out(trial, state, self.policy.limits, self.hardware):
                trial = ruled_out
            elif self.clock() >= self.deadline:
                trial = self.unreached(trial)
            else:
                self.notify(f"trying {transform}: predicted up to {trial.predicted:.2f}x for {step.phase}")
                with reusing():
                    trial, candidate = self.attempt(trial, state.variant)
                    if trial.quality is not None and trial.quality.verdict is Verdict.FAIL:
                        others = max((predicted[other] or 0.0 for other in choices), default=0.0)
                        trial, candidate = self.refine(trial, state, others)
            self.trials.append(trial)
            if trial.outcome is Outcome.ACCEPTED and candidate is not None:
                state = self.examine(candidate)
        return state

    def unreached(self, trial: Trial) -> Trial:
        return replace(trial, outcome=Outcome.UNREACHED, reason=f"the budget of {self.policy.budget_s:.0f} s was spent")

    def attempt(self, trial: Trial, incumbent: Variant) -> tuple[Trial, Variant | None]:
        """One candidate from application to verdict, with what it took."""
        start = self.clock()
        trial, candidate = self.judge(trial, incumbent)
        trial = replace(trial, seconds=self.clock() - start)
        self.notify(f"{trial.outcome} {trial.transform}: {trial.reason}")
        return trial, candidate

    def refine(self, failed: Trial, state: State, others: float) -> tuple[Trial, Variant | None]:
        """Try a transform that failed the gate without the layers that made it fail, where there are few enough.

        Args:
            failed: the trial of the whole transform.
            others: speed-up that the step's next choice promises; a refined transform has to promise more.

        Returns:
            The last trial of it, which is yet to be recorded, and its variant.
        """
        start = self.clock()
        trial, candidate = failed, None
        try:
            found = self.look_into(failed, state, others)
        except DeviceError:
            raise
        except Exception as error:  # what is measured is foreign code, as in a trial
            outside.pass_on(error)
            log.debug("%s could not be refined", failed.transform, exc_info=True)
            found = Refinement((), f"its layers could not be compared: {self.bench.explain(error)}")
        if found is None:
            return trial, candidate
        seconds = failed.seconds + self.clock() - start
        trial = replace(failed, reason=f"{failed.reason}; {found.finding}", seconds=seconds)
        for proposal in found.proposals:
            self.trials.append(trial)
            refined = replace(failed, transform=proposal.transform, predicted=proposal.predicted, quality=None)
            if self.clock() >= self.deadline:
                return self.unreached(replace(refined, seconds=0.0, compile_s=0.0)), None
            trial, candidate = self.attempt(refined, state.variant)
            if trial.outcome in UNTRIED:
                break
            trial = replace(trial, reason=f"{proposal.reason}; {trial.reason}")
            if trial.quality is None or trial.quality.verdict is Verdict.PASS:
                break
        return trial, candidate

    def look_into(self, failed: Trial, state: State, others: float) -> Refinement | None:
        """Which layers made a transform fail, and what to try without them; None where it cannot be tried so."""
        tier = failed.quality.tier if failed.quality else self.policy.tier
        probe = self.bench.probe(state.variant, failed.transform, tier)
        if probe is None:
            return None
        self.notify(f"looking for the layers that make {failed.transform} fail")
        wide = promise(probe.wider, failed.target, state, self.hardware) if probe.wider else None
        promises = Promises(failed.predicted or 1.0, wide or 1.0, max(1 + self.policy.limits.min_gain, others))
        end = min(self.deadline, self.clock() + REFINING_SHARE * self.policy.budget_s)
        return refine(probe, promises, spent=lambda: self.clock() >= end)

    def judge(self, trial: Trial, incumbent: Variant) -> tuple[Trial, Variant | None]:
        """One candidate's verdict. Whatever it raises, the incumbent is as it was, and so is the memory.

        Raises:
            DeviceError: the device is dead for this process, and every further trial with it.
        """
        candidate = None
        try:
            for stage in self.stages(trial, incumbent):
                trial, candidate = stage
        except DeviceError:
            raise
        except Exception as error:  # a transform is foreign code: its crash costs the candidate, nothing else
            outside.pass_on(error)
            log.debug("%s crashed", trial.transform, exc_info=True)
            trial, candidate = replace(trial, outcome=Outcome.ERROR, reason=self.bench.explain(error)), None
        if candidate is None:  # and no exception is alive, whose traceback would hold on to its memory
            self.bench.tidy()
        return trial, candidate

    def stages(self, trial: Trial, incumbent: Variant) -> Iterator[tuple[Trial, Variant | None]]:
        """One candidate from application to verdict, as far as it comes: what is known after each stage.

        The candidate is yielded with the verdict that keeps it, and before only as None. Raises what the candidate
        raises.
        """
        transform, phase, start = trial.transform, trial.target, self.clock()
        if death := self.bench.risk(incumbent, transform, max(LEAST_S, self.deadline - start)):
            yield replace(trial, outcome=Outcome.ERROR, reason=death), None
            return
        try:
            candidate = incumbent.with_transform(transform)
            missing = transform.took_effect(candidate)
        except TransformError as error:
            yield replace(trial, outcome=Outcome.BLOCKED, reason=str(error)), None
            return
        yield (trial := replace(trial, compile_s=self.clock() - start)), None
        if missing is not None:
            yield replace(trial, outcome=Outcome.BLOCKED, reason=f"it had no effect: {missing}"), None
            return
        memory = self.bench.memory_ratio(candidate)
        if memory > self.policy.limits.max_memory_ratio:
            limit = self.policy.limits.max_memory_ratio
            reason = f"weights would take {memory:.2f}x the original's memory, {limit:.2f}x is allowed"
            yield replace(trial, outcome=Outcome.REJECTED, reason=reason), None
            return
        if (first := self.bench.glance(incumbent, candidate, phase)) < HOPELESS:
            reason = f"the first run of {phase} took {1 / first:.1f}x as long"
            yield replace(trial, outcome=Outcome.REJECTED, reason=reason), None
            return
        quality = self.bench.judge(candidate, tier_for(candidate, self.policy))
        outcome = OUTCOMES[quality.verdict] if quality.examined else Outcome.BLOCKED
        yield (trial := replace(trial, quality=quality, outcome=outcome, reason=quality.reason)), None
        if quality.verdict is not Verdict.PASS:
            return
        latency = self.bench.race(incumbent, candidate, phase)
        outcome = Outcome.INCONCLUSIVE if latency.drowned else OUTCOMES[latency.verdict]
        yield replace(trial, latency=latency, outcome=outcome, reason=latency.reason), candidate


def search(
    original: Variant,
    policy: Policy,
    hardware: Hardware,
    bench: Bench,
    *,
    notify: Callable[[str], None] = log.info,
    clock: Callable[[], float] = time.monotonic,
    deadline: float | None = None,
    obstacle: str | None = None,
) -> Found:
    """Try what the diagnosis calls for, keeping each step that proves itself.

    After every accepted step the variant is profiled and diagnosed again: removing one bottleneck shows the next.

    Args:
        original: a variant without transforms.
        deadline: value of `clock` after which nothing new is tried; default: the policy's budget from now.
        obstacle: why nothing can be tried, or None; what would have been tried is recorded with it.
    """
    deadline = clock() + policy.budget_s if deadline is None else deadline
    run = _Search(policy, hardware, bench, notify, clock, deadline, obstacle)
    notify("profiling the original")
    before = state = run.examine(original)
    pending, parameters = list(policy.steps), parameter_count(original, policy)
    while step := next((s for s in pending if why_not(s, state.diagnoses, hardware, parameters) is None), None):
        pending.remove(step)
        state = run.take(step, state)
    for step in pending:
        reason = why_not(step, state.diagnoses, hardware, parameters) or ""
        run.trials += [Trial(make(c), step.name, step.phase, Outcome.SKIPPED, reason) for c in step.choices]
    return Found(before, state, tuple(run.trials))


def make(choice: Choice) -> Transform:
    return transforms.make(choice.transform, choice.params, choice.phase)


def parameter_count(original: Variant, policy: Policy) -> int | None:
    """How many parameters a model has, where the policy asks."""
    if all(step.parameters is None for step in policy.steps):
        return None
    return sum(parameter.numel() for parameter in original.original.parameters())


def why_not(
    step: Step, diagnoses: Mapping[Phase, Diagnosis], hardware: Hardware, parameters: int | None = None
) -> str | None:
    """Why a step is not called for, or None.

    Args:
        parameters: how many the model has; None: nobody knows, and every size will do.
    """
    if step.devices and hardware.device not in step.devices:
        return f"for {', '.join(sorted(step.devices))}, this is {hardware.device}"
    found_gpu = architecture.capability(hardware)
    if step.capabilities and not (found_gpu and any(wanted.admits(found_gpu) for wanted in step.capabilities)):
        this = architecture.name(found_gpu) if found_gpu else hardware.device
        return f"for GPUs of {' or '.join(map(str, step.capabilities))}, this is {this}"
    if step.parameters is not None and parameters is not None and not step.parameters.admits(parameters):
        return f"for models of {step.parameters} parameters, this has {parameters:.3g}"
    found = diagnoses[step.phase].bottleneck
    if step.bottlenecks and found not in step.bottlenecks:
        return f"{step.phase} is {found}-bound; this helps where it is {' or '.join(sorted(step.bottlenecks))}-bound"
    return None


def promise(transform: Transform, phase: Phase, state: State, hardware: Hardware) -> float | None:
    """Predicted best-case speed-up of `phase`, or None where the transform cannot be had."""
    if unavailable(transform, state.variant, hardware, state.obstacle) is not None:
        return None
    return expect(transform, phase, state, hardware)


def unavailable(transform: Transform, variant: Variant, hardware: Hardware, obstacle: str | None = None) -> str | None:
    """Why a transform cannot be had, or None.

    Args:
        obstacle: why none can on this model, where that is known.
    """
    reason = obstacle or variant.state.obstacle() or transform.unavailable(variant, hardware)
    return reason or rehearsal.obstacle(variant.original, transform, hardware)


def expect(transform: Transform, phase: Phase, state: State, hardware: Hardware) -> float:
    """Predicted best-case speed-up of `phase`, were the transform to be had."""
    return transform.predict(state.profile, hardware).get(phase, 1.0)


def rule_out(trial: Trial, state: State, limits: Limits, hardware: Hardware) -> Trial | None:
    """The trial settled without a run (cannot be had, or cannot win), or None when it has to be tried."""
    missing, predicted = None, trial.predicted
    if predicted is None:
        missing = unavailable(trial.transform, state.variant, hardware, state.obstacle) or "not available"
        if not isinstance(missing, Blocker):
            return replace(trial, outcome=Outcome.UNAVAILABLE, reason=missing)
        predicted = expect(trial.transform, trial.target, state, hardware)  # is anything lost?
    if predicted < 1 + limits.min_gain:
        reason = f"the roofline allows {predicted:.2f}x at best, {1 + limits.min_gain:.2f}x is the least worth having"
        return replace(trial, outcome=Outcome.SKIPPED, reason=reason, predicted=predicted)
    if missing is not None:
        return replace(trial, outcome=Outcome.BLOCKED, reason=str(missing), predicted=predicted)
    needed, free = trial.transform.extra_bytes(state.variant), ROOM * state.free_bytes
    if needed > free:
        reason = (
            f"it takes {needed / 1e9:.3g} GB beside what serves now, and {free / 1e9:.3g} GB of memory are free; "
            "a shorter workload, or keep_original=False once something smaller is committed, makes room"
        )
        return replace(trial, outcome=Outcome.BLOCKED, reason=reason)
    return None


def tier_for(candidate: Variant, policy: Policy) -> str:
    """A variant made of lossless transforms alone has to be lossless, whatever the policy would accept."""
    return "lossless" if all(t.lossless for t in candidate.transforms) else policy.tier
