"""The incumbent: the best variant that a search has proven, and what its trials have shown so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..errors import BudgetSpentError
from ..runtime.variant import Transform, Variant
from .choose import SearchState
from .order import Pace, gained_nothing, request_s, slow_prefill_of
from .plan import Confirmation, Trial, TrialOutcome
from .trying import Bench, Trier


def examine(bench: Bench, variant: Variant, obstacle: str | None = None) -> SearchState:
    """Profile and diagnose a variant, before anything is tried on it."""
    profile = bench.profile(variant)
    return SearchState(variant, profile, bench.diagnose(profile), bench.free_bytes(), obstacle)


@dataclass
class Incumbent:
    """The variant that candidates are compared with: the original, until held-out prompts confirm another one.

    Args:
        trier: tries the candidates.
        before: the original.
        state: the current variant.
        kept: called with each confirmed variant.

    Attributes:
        trials: every candidate that was considered, in order.
        confirmation: of the current variant, or of the last one that was accepted but not confirmed.
        refuted: transforms of the variant that was not confirmed, if none was kept.
        usual_s: seconds of a trial: the least at first, then the latest full trial's without compiling.
        making_s: seconds in which the current variant was made; most changes make all of it anew.
        slow_prefill: weights for prefill that are good enough and gained no time; on a GPU.
        failures: step -> its choices that gained no time; on a GPU.
    """

    trier: Trier
    before: SearchState
    state: SearchState
    kept: Callable[[Variant], None]
    trials: list[Trial] = field(default_factory=list)
    confirmation: Confirmation | None = None
    refuted: tuple[Transform, ...] = ()
    usual_s: float = 0.0
    making_s: float = 0.0
    slow_prefill: Transform | None = None
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def pace(self) -> Pace:
        """What trials take now."""
        return Pace(self.trier.hardware.device, self.usual_s, self.making_s, self.before.profile.phases)

    @property
    def on_gpu(self) -> bool:
        return self.trier.hardware.device != "cpu"

    def seconds_of(self, trial: Trial) -> float:
        """Seconds that a trial is taken to last: on a CPU, as long as the latest one."""
        return self.pace.seconds(trial) if self.on_gpu else self.usual_s

    def settle(self, trial: Trial, candidate: Variant | None, *, held_out: bool = False) -> None:
        """Record a trial. An accepted candidate is used from now on if held-out prompts confirm it.

        Args:
            held_out: whether they confirmed it already.
        """
        before, start, before_s = self.state, self.trier.clock(), sum(request_s(self.state).values())
        if trial.outcome is TrialOutcome.ACCEPTED and candidate is not None:
            if held_out:
                self._keep(candidate, Confirmation(None, trial.quality, trial.latency))
            else:
                trial = self._confirm(trial, candidate)
        if self.state is not before:
            self.making_s = trial.compile_s
            self.slow_prefill = self.slow_prefill if trial.target == "decode" else None
        elif self.on_gpu and gained_nothing(trial):
            self.failures[trial.step] += 1
            self.slow_prefill = self.slow_prefill or slow_prefill_of(trial)
        if trial.latency is not None:
            faster = before_s / sum(request_s(self.state).values()) if before_s else 1.0
            # half of a trial's requests are the original's, half are those of variants about as fast as the current one
            self.usual_s = (trial.seconds - trial.compile_s + self.trier.clock() - start) * (1 + 1 / faster) / 2
        self.trials.append(trial)

    def _confirm(self, trial: Trial, candidate: Variant) -> Trial:
        self.trier.notify(f"confirming {trial.candidate} on held-out prompts")
        try:
            found = self.trier.bench.confirm(candidate)
        except BudgetSpentError as error:
            return replace(trial, outcome=TrialOutcome.UNREACHED, reason=f"{trial.reason}; not confirmed: {error}")
        if found.holds:
            self._keep(candidate, replace(found, quality=trial.quality) if found.brief else found)
            short = "; confirmed on a few held-out prompts: the budget had no room for more"
            return replace(trial, reason=f"{trial.reason}{short}") if found.brief else trial
        if self.state is self.before:  # a confirmed variant keeps its confirmation
            self.confirmation = found
            self.refuted = candidate.transforms
        outcome = TrialOutcome.REJECTED if found.is_disproof else TrialOutcome.INCONCLUSIVE
        self.trier.bench.free_memory()
        return replace(trial, outcome=outcome, reason=f"{trial.reason}; on held-out prompts, {found.reason}")

    def _keep(self, candidate: Variant, confirmation: Confirmation) -> None:
        """Make a proven variant the current one."""
        self.kept(candidate)
        self.state = examine(self.trier.bench, candidate, self.before.obstacle)
        self.confirmation = confirmation
