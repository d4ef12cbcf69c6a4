"""The search: try a draft of the whole plan first, then single changes to it, and keep what is proven.

All measuring is done by a `Bench`, so that tests can run the search's logic on scripted numbers in milliseconds.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ..errors import BudgetSpentError, TransformError
from ..machine.hardware import Hardware
from ..runtime.variant import Stage, Transform, Variant
from ..transforms.linears import reusing
from ..validate import Verdict
from . import compose
from .budget import least, seconds_of
from .choose import (
    SearchState,
    jointly,
    make,
    parameter_count,
    promise,
    rule_out,
    why_not,
)
from .incumbent import Incumbent, examine
from .order import CalledStep, first_of, only_compiles, share
from .plan import Confirmation, Trial, TrialOutcome
from .policy import Choice, Policy, PolicyStep
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
        budget_s: seconds that the search was allowed.
    """

    before: SearchState
    after: SearchState
    trials: tuple[Trial, ...]
    confirmation: Confirmation | None = None
    refuted: tuple[Transform, ...] = ()
    budget_s: float | None = None


@dataclass
class _Search:
    trier: Trier
    best: Incumbent
    pending: list[PolicyStep]
    parameters: int | None
    chosen: dict[str, Transform] = field(default_factory=dict)  # step -> its transform in the draft in use
    shortfalls: dict[Transform, str] = field(default_factory=dict)  # transform -> why its quality is too low
    too_short: str = ""  # why the budget is too short for any trial
    bases: dict[object, SearchState] = field(default_factory=dict)  # the latest result of `without`

    @property
    def state(self) -> SearchState:
        """The variant that candidates are compared with now."""
        return self.best.state

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
            self.best.settle(*self.attempt(compose.trial(parts), made, held_out=whole), held_out=whole)
            if self.state is not before:
                self.chosen |= {part.step.name: part.transform for part in parts}
                left = [replace(step, choices=self.unchosen(step)) for step in self.pending]
                self.pending = [step for step in left if step.choices]

    def unchosen(self, step: PolicyStep) -> tuple[Choice, ...]:
        """The choices of a step that are not in the draft in use."""
        return tuple(choice for choice in step.choices if make(choice) != self.chosen.get(step.name))

    def proceed(self) -> None:
        """Take steps until none is called for.

        On a CPU, all choices of a step are tried in turn. On a GPU, where trials differ more in what they take, one is,
        and then the steps are ranked anew.
        """
        while called := [step for step in self.pending if self.is_called(step)]:
            step = self.next_of(called)
            self.pending.remove(step)
            rest: PolicyStep | None = self.try_best_choice(step)
            while rest is not None and not self.best.on_gpu:
                rest = self.try_best_choice(rest)
            self.pending += [rest] if rest is not None else []

    def try_best_choice(self, step: PolicyStep) -> PolicyStep | None:
        """Try the most promising of a step's choices. Returns the step with those that are left, or None.

        Of choices that promise about as much, the policy's first is tried first.

        If the draft in use has a transform for the step, the other choices are tried as its replacement.
        """
        trials = self.candidates(step)
        most = max(trial.predicted or 0.0 for trial in trials)
        place = next(n for n, trial in enumerate(trials) if (trial.predicted or 0.0) * compose.ALIKE >= most)
        others = max((t.predicted or 0.0 for n, t in enumerate(trials) if n != place), default=0.0)
        paired, kept = bool(trials[place].others), self.try_candidate(trials[place], step, others)
        if paired and not kept:
            self.best.slow_prefill = None
            return step  # what compiles is still to be tried alone
        choices = step.choices[:place] + step.choices[place + 1 :]
        return replace(step, choices=choices) if choices else None

    def try_candidate(self, trial: Trial, step: PolicyStep, others: float) -> bool:
        """Try a candidate of a step unless it can be ruled out. Returns whether it was kept."""
        before = base = self.state
        replaced = self.chosen.get(step.name)
        if replaced is not None and trial.transform not in self.trier.faults:
            trial, base = replace(trial, instead_of=(replaced,)), self.without(replaced)
        if ruled_out := self.rule_out(trial, step, base):
            self.best.trials.append(ruled_out)
            return False
        with reusing(before.variant):
            (*failed, last), candidate = self.find(trial, base, others)
            self.best.trials += failed
            self.best.settle(last, candidate)
        kept = self.state is not before
        if kept and replaced is not None:
            self.chosen[step.name] = last.transform
        return kept

    def candidates(self, step: PolicyStep) -> list[Trial]:
        """A trial for each choice of a step, in its order."""
        return [self.candidate(make(choice), step) for choice in step.choices]

    def candidate(self, transform: Transform, step: PolicyStep) -> Trial:
        """The trial of a transform: alone, or compiled prefill together with weights that gained no time without it.

        A library that multiplies 8-bit numbers launches more kernels, which cost the host what the device saves.
        Compiled, it launches few of them.
        """
        predicted = self.promise(transform, step)
        trial = Trial(transform, step.name, step.phase, TrialOutcome.SKIPPED, "", predicted=predicted)
        weights = self.best.slow_prefill if step.phase == "prefill" and transform.stage is Stage.COMPILE else None
        alone = None if weights is None else self.promise(weights, step)
        if weights is None or alone is None or predicted is None:
            return trial
        return replace(trial, transform=weights, others=(transform,), predicted=jointly(alone, predicted))

    def why_not(self, step: PolicyStep) -> str | None:
        """Why a step is not called for, or None."""
        return why_not(step, self.state.diagnoses, self.trier.hardware, self.parameters)

    def is_called(self, step: PolicyStep) -> bool:
        """Whether to take a step: its bottleneck was found, or it may help weights that gained no time without it."""
        if self.best.slow_prefill is not None and step.phase == "prefill" and only_compiles(step):
            step = replace(step, bottlenecks=frozenset())
        return self.why_not(step) is None

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
        original, current = self.best.before, self.state.variant
        others = [t for t in current.transforms if t != replaced and t.stage is Stage.WEIGHTS]
        key = current, replaced
        if key not in self.bases:
            try:
                with reusing(current):
                    self.bases = {key: replace(original, variant=original.variant.with_transforms(others))}
            except TransformError:  # one of them needs the replaced one
                self.bases = {key: original}
        return self.bases[key]

    def next_of(self, called: list[PolicyStep]) -> PolicyStep:
        """The step to take now.

        It is the policy's first where memory is the objective, because what a step promises is time, and on a CPU
        without a draft in use.
        """
        if self.trier.policy.objective == "memory" or not (self.chosen or self.best.on_gpu):
            return called[0]
        failures = self.best.failures
        offers = [CalledStep(s, self.candidates(s), share(self.state, s.phase), failures[s.name]) for s in called]
        return first_of(offers, self.best.pace, self.trier.policy.limits.min_gain)

    def find(self, trial: Trial, base: SearchState, others: float) -> tuple[list[Trial], Variant | None]:
        """Try a candidate. If it loses too much quality, try it without some layers.

        Args:
            base: the variant that its layers would be compared on.
            others: speed-up that the step's next choice promises.

        Returns:
            The trials to record, of which the last decides, and the last one's variant.
        """
        if (reason := self.shortfalls.get(trial.transform)) is not None and not self.lateness(trial):
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
        if late := self.lateness(trial):
            return replace(trial, outcome=TrialOutcome.UNREACHED, reason=late), None
        promised = f": predicted up to {trial.predicted:.2f}x for {trial.target}" if trial.predicted else ""
        self.trier.notify(f"trying {trial.candidate}{promised}")
        return self.trier.attempt(trial, self.state.variant, made, held_out=held_out)

    def lateness(self, trial: Trial) -> str | None:
        """Why a trial may not begin any more, or None."""
        return self.too_short or self.trier.lateness(self.best.seconds_of(trial))


def search(
    original: Variant,
    policy: Policy,
    hardware: Hardware,
    bench: Bench,
    *,
    notify: Callable[[str], None] = log.info,
    clock: Callable[[], float] = time.monotonic,
    start: float | None = None,
    obstacle: str | None = None,
    kept: Callable[[Variant], None] = lambda variant: None,
) -> Found:
    """Try what the diagnosis calls for, and keep each change that is proven.

    The draft comes first: the most promising transforms for both phases together. Then come single changes to the
    current variant, ordered by worth for their cost, or, on a CPU without a draft, in the policy's order. After every
    change the variant is profiled and diagnosed again, because removing one bottleneck shows the next.

    Args:
        original: a variant without transforms.
        start: value of `clock` at which the budget began; default: now.
        obstacle: why nothing can be tried, or None; recorded as the reason of every candidate.
        kept: called with each confirmed variant while the search goes on.
    """
    start = clock() if start is None else start
    notify("profiling the original")
    before = examine(bench, original, obstacle)
    parameters = parameter_count(original, policy)
    decode_s = before.profile.phases["decode"].seconds
    budget_s = seconds_of(policy.budget_s, hardware.device, parameters or 0, decode_s)
    if budget_s != least(policy.budget_s):
        notify(f"the budget is {budget_s:.0f} s, for {parameters:.3g} parameters at {1e3 * decode_s:.3g} ms a token")
    bench.begin(budget_s, start + budget_s)
    trier = Trier(policy, hardware, bench, notify, clock, budget_s, start + budget_s)
    best = Incumbent(trier, before, before, kept)
    run = _Search(trier, best, list(policy.steps), parameters)
    if late := trier.lateness(least_s := bench.least_s(before.profile)):
        whole_s = clock() - start + least_s
        run.too_short = (
            f"judging and timing a candidate: {late}; give a budget of {math.ceil(whole_s / 10) * 10} s or more"
        )
    else:
        best.usual_s = least_s / 2  # without a confirmation
        with suppress(BudgetSpentError):  # then every step below is recorded as not reached
            run.begin(compose.compose(before, trier, parameters))
    run.proceed()
    for step in run.pending:
        reason = run.why_not(step) or ""
        best.trials += [Trial(make(c), step.name, step.phase, TrialOutcome.SKIPPED, reason) for c in step.choices]
    return Found(before, best.state, tuple(best.trials), best.confirmation, best.refuted, budget_s)
