"""The search: try a draft of the whole plan first, then single changes to it, and keep what is proven.

All measuring is done by a `Bench`, so that tests can run the search's logic on scripted numbers in milliseconds.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ..errors import BudgetSpentError, TransformError
from ..machine.hardware import Hardware
from ..runtime.variant import Stage, Transform, Variant
from ..transforms.linears import reusing
from ..validate import Verdict
from ..workload import Phase
from . import compose
from .choose import SearchState, make, parameter_count, promise, rule_out, why_not, worth
from .plan import Confirmation, Trial, TrialOutcome
from .policy import Policy, PolicyStep
from .trying import Bench, Trier

log = logging.getLogger("autotune")


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Args:
        before: the original.
        after: the best variant, or the original.
        trials: every candidate that was considered.
        confirmation: of the best variant, or of the last one that was accepted but not confirmed.
        refuted: transforms of the variant that was not confirmed, if none was kept.
    """

    before: SearchState
    after: SearchState
    trials: tuple[Trial, ...]
    confirmation: Confirmation | None = None
    refuted: tuple[Transform, ...] = ()


@dataclass
class _Search:
    trier: Trier
    before: SearchState
    state: SearchState
    trials: list[Trial] = field(default_factory=list)
    confirmation: Confirmation | None = None
    refuted: tuple[Transform, ...] = ()
    chosen: dict[str, Transform] = field(default_factory=dict)  # step -> its transform in the draft in use
    shortfalls: dict[Transform, str] = field(default_factory=dict)  # transform -> why its quality is too low
    usual_s: float = 0.0  # seconds of a trial: the least at first, then the latest full trial's without compiling
    too_short: str = ""  # why the budget is too short for any trial
    kept: Callable[[Variant], None] = lambda variant: None
    bases: dict[object, SearchState] = field(default_factory=dict)  # the latest result of `without`

    def begin(self, draft: compose.Draft) -> None:
        """Try the draft. If it fails, try its transforms for each phase.

        The whole draft is a first candidate, not the best of several, so it is proven on held-out prompts directly.
        """
        self.shortfalls = draft.shortfalls
        for parts in draft.attempts():
            if any(part.step.name in self.chosen for part in parts):
                continue
            before, whole = self.state, parts is draft.parts
            made = draft.made if whole else None
            self.settle(*self.attempt(compose.trial(parts), made, held_out=whole), held_out=whole)
            if self.state is not before:
                self.chosen |= {part.step.name: part.transform for part in parts}

    def take(self, step: PolicyStep) -> None:
        """Try a step's choices, the most promising first. Each one kept changes what the rest can promise.

        Of choices that promise about as much, the policy's first is tried first.

        If the draft in use has a transform for the step, the other choices are tried as its replacement.
        """
        choices = [t for choice in step.choices if (t := make(choice)) != self.chosen.get(step.name)]
        while choices:
            predicted = {t: self.promise(t, step) for t in choices}
            most = max(gain or 0.0 for gain in predicted.values())
            transform = next(t for t in choices if (predicted[t] or 0.0) * compose.ALIKE >= most)
            choices.remove(transform)
            trial = Trial(transform, step.name, step.phase, TrialOutcome.SKIPPED, "", predicted=predicted[transform])
            base = self.state
            replaced = self.chosen.get(step.name)
            if replaced is not None and transform not in self.trier.faults:
                trial, base = replace(trial, instead_of=(replaced,)), self.without(replaced)
            if ruled_out := self.rule_out(trial, step, base):
                self.trials.append(ruled_out)
                continue
            others, before = max((predicted[other] or 0.0 for other in choices), default=0.0), self.state
            with reusing(self.state.variant):
                (*failed, last), candidate = self.find(trial, base, others)
                self.trials += failed
                self.settle(last, candidate)
            if replaced is not None and self.state is not before:
                self.chosen[step.name] = last.transform

    def promise(self, transform: Transform, step: PolicyStep) -> float | None:
        """Predicted best-case speed-up of the step's phase over the current variant, or None if unavailable."""
        replaced = self.chosen.get(step.name)

        def promised() -> float | None:
            before = None if replaced is None else self.without(replaced)
            return promise(transform, step.phase, self.state, self.trier.hardware, replaced=replaced, before=before)

        return self.trier.ask(transform, promised)

    def rule_out(self, trial: Trial, step: PolicyStep, base: SearchState) -> Trial | None:
        """Settle a trial without a run. Returns None if it has to be tried. A transform that raises is an error."""
        transform, limits, settled = trial.transform, self.trier.policy.limits, None
        if transform not in self.trier.faults:  # else it raised when it was asked what it promises
            settled = self.trier.ask(transform, lambda: rule_out(trial, step.phase, base, limits, self.trier.hardware))
        fault = self.trier.faults.get(transform)
        return settled if fault is None else replace(trial, outcome=TrialOutcome.ERROR, reason=fault)

    def without(self, replaced: Transform) -> SearchState:
        """The original with the other weights of the current variant, which a replacement may share."""
        current = self.state.variant
        others = [t for t in current.transforms if t != replaced and t.stage is Stage.WEIGHTS]
        key = current, replaced
        if key not in self.bases:
            try:
                with reusing(current):
                    self.bases = {key: replace(self.before, variant=self.before.variant.with_transforms(others))}
            except TransformError:  # one of them needs the replaced one
                self.bases = {key: self.before}
        return self.bases[key]

    def rank(self, step: PolicyStep) -> tuple[bool, float]:
        """What comes first: the step whose best choice is worth the most for a whole request.

        Guessing ahead comes last. It promises as if every guess were right, and gains less over a step made faster.
        """
        choices, share = [make(choice) for choice in step.choices], self.share(step.phase)
        early = any(transform.stage < Stage.SPECULATION for transform in choices)
        promised = [(transform, self.promise(transform, step) or 1.0) for transform in choices]
        return early, max(worth(transform, 1 / (1 - share + share / gain)) for transform, gain in promised)

    def share(self, phase: Phase) -> float:
        """Share of a request's time that the current variant spends in a phase; 1 if the workload is unknown."""
        spent_s = self.request_s()
        return spent_s[phase] / sum(spent_s.values()) if spent_s else 1.0

    def request_s(self) -> Mapping[Phase, float]:
        """Seconds of a request of the workload in each phase, by the current variant; empty if it is unknown."""
        if (work := self.state.variant.workload) is None:
            return {}
        phases = self.state.profile.phases
        return {"prefill": phases["prefill"].seconds, "decode": (work.new_tokens - 1) * phases["decode"].seconds}

    def find(self, trial: Trial, base: SearchState, others: float) -> tuple[list[Trial], Variant | None]:
        """Try a candidate. If it loses too much quality, try it without some layers.

        Args:
            base: the variant that its layers would be compared on.
            others: speed-up that the step's next choice promises.

        Returns:
            The trials to record, of which the last decides, and the last one's variant.
        """
        if (reason := self.shortfalls.get(trial.transform)) is not None and not self.lateness():
            trial = replace(trial, outcome=TrialOutcome.REJECTED, reason=f"on the exam's texts, read at once, {reason}")
            return self.trier.refine(trial, self.state, base, others)
        trial, candidate = self.attempt(trial)
        if trial.quality is None or trial.quality.verdict is not Verdict.FAIL:
            return [trial], candidate
        return self.trier.refine(trial, self.state, base, others)

    def attempt(
        self, trial: Trial, made: list[Variant] | None = None, *, held_out: bool = False
    ) -> tuple[Trial, Variant | None]:
        """Try one candidate if the budget allows.

        Args:
            made: holds the candidate if it is built already; emptied.
            held_out: whether it is proven on held-out prompts directly.
        """
        if late := self.lateness():
            return replace(trial, outcome=TrialOutcome.UNREACHED, reason=late), None
        promised = f": predicted up to {trial.predicted:.2f}x for {trial.target}" if trial.predicted else ""
        self.trier.notify(f"trying {trial.candidate}{promised}")
        return self.trier.attempt(trial, self.state.variant, made, held_out=held_out)

    def lateness(self) -> str | None:
        """Why no further trial may begin, or None."""
        return self.too_short or self.trier.lateness(self.usual_s)

    def settle(self, trial: Trial, candidate: Variant | None, *, held_out: bool = False) -> None:
        """Record a trial. An accepted candidate is used from now on if held-out prompts confirm it.

        Args:
            held_out: whether they confirmed it already.
        """
        start, before_s = self.trier.clock(), sum(self.request_s().values())
        if trial.outcome is TrialOutcome.ACCEPTED and candidate is not None:
            if held_out:
                self.keep(candidate, Confirmation(None, trial.quality, trial.latency))
            else:
                trial = self.confirm(trial, candidate)
        if trial.latency is not None:
            faster = before_s / sum(self.request_s().values()) if before_s else 1.0
            # half of a trial's requests are the original's, half are those of variants about as fast as the current one
            self.usual_s = (trial.seconds - trial.compile_s + self.trier.clock() - start) * (1 + 1 / faster) / 2
        self.trials.append(trial)

    def confirm(self, trial: Trial, candidate: Variant) -> Trial:
        self.trier.notify(f"confirming {trial.candidate} on held-out prompts")
        try:
            found = self.trier.bench.confirm(candidate)
        except BudgetSpentError as error:
            return replace(trial, outcome=TrialOutcome.UNREACHED, reason=f"{trial.reason}; not confirmed: {error}")
        if found.holds:
            self.keep(candidate, replace(found, quality=trial.quality) if found.brief else found)
            short = "; confirmed on a few held-out prompts: the budget had no room for more"
            return replace(trial, reason=f"{trial.reason}{short}") if found.brief else trial
        if self.state is self.before:  # a confirmed variant keeps its confirmation
            self.confirmation = found
            self.refuted = candidate.transforms
        outcome = TrialOutcome.REJECTED if found.is_disproof else TrialOutcome.INCONCLUSIVE
        self.trier.bench.free_memory()
        return replace(trial, outcome=outcome, reason=f"{trial.reason}; on held-out prompts, {found.reason}")

    def keep(self, candidate: Variant, confirmation: Confirmation) -> None:
        """Make a proven variant the current one."""
        self.kept(candidate)
        self.state = self.trier.examine(candidate, self.before.obstacle)
        self.confirmation = confirmation


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
    kept: Callable[[Variant], None] = lambda variant: None,
) -> Found:
    """Try what the diagnosis calls for, and keep each change that is proven.

    The draft comes first: the most promising transforms for both phases together. Then come single changes to the
    current variant, ordered by worth for their cost, or, without a draft, in the policy's order. After every change the
    variant is profiled and diagnosed again, because removing one bottleneck shows the next.

    Args:
        original: a variant without transforms.
        deadline: value of `clock` after which nothing new is tried; default: the policy's budget from now.
        obstacle: why nothing can be tried, or None; recorded as the reason of every candidate.
        kept: called with each confirmed variant while the search goes on.
    """
    start = clock()
    deadline = start + policy.budget_s if deadline is None else deadline
    trier = Trier(policy, hardware, bench, notify, clock, deadline)
    notify("profiling the original")
    before = trier.examine(original, obstacle)
    run = _Search(trier, before, before, kept=kept)
    parameters = parameter_count(original, policy)
    if late := trier.lateness(least_s := bench.least_s(before.profile)):
        whole_s = clock() - start + least_s
        run.too_short = (
            f"judging and timing a candidate: {late}; give a budget of {math.ceil(whole_s / 10) * 10} s or more"
        )
    else:
        run.usual_s = least_s / 2  # without a confirmation
        with suppress(BudgetSpentError):  # then every step below is recorded as not reached
            run.begin(compose.compose(before, trier, parameters))
    pending = list(policy.steps)
    while called := [s for s in pending if why_not(s, run.state.diagnoses, hardware, parameters) is None]:
        step = max(called, key=run.rank) if run.chosen else called[0]
        pending.remove(step)
        run.take(step)
    for step in pending:
        reason = why_not(step, run.state.diagnoses, hardware, parameters) or ""
        run.trials += [Trial(make(c), step.name, step.phase, TrialOutcome.SKIPPED, reason) for c in step.choices]
    return Found(before, run.state, tuple(run.trials), run.confirmation, run.refuted)
