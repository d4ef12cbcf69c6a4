"""Which step of a policy comes next: the one that may gain a request the most for the time that trying it takes. Pure.

On a GPU that time is seconds: a trial of the usual length, making anew what serves now, and compiling. On a CPU it is
counted in trials of the usual length, and what is compiled or foreign, which runs in a child process first, takes more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..diagnose.costs import PhaseProfile
from ..runtime.variant import Stage, Transform
from ..transforms import is_foreign
from ..validate import Verdict
from ..workload import Phase
from .choose import SearchState, make, worth
from .plan import Trial
from .policy import PolicyStep

LONG_TRIAL = 3.0  # trials of the usual length that one of foreign code takes on a CPU
COMPILING_S = 0.05  # seconds for each operator of a phase that is compiled: an estimate, 70 s for 32 layers


@dataclass(frozen=True)
class CalledStep:
    """A step that is called for.

    Args:
        trials: one for each choice.
        share: of a request's time that is spent in the step's phase.
        failures: how many of its choices gained no time.
    """

    step: PolicyStep
    trials: list[Trial]
    share: float
    failures: int = 0

    @property
    def promised(self) -> float:
        """The highest predicted speed-up of the phase."""
        return max(trial.predicted or 1.0 for trial in self.trials)

    @property
    def is_early(self) -> bool:
        """Whether something precedes guessing ahead, which promises as if every guess were right, and comes last."""
        return any(t.stage < Stage.SPECULATION for trial in self.trials for t in trial.transforms)


@dataclass(frozen=True)
class Pace:
    """What trials take on this machine.

    Args:
        device: device type.
        usual_s: seconds of a trial, without making the candidate.
        making_s: seconds in which the current variant was made. Most changes make all of it anew.
        original: phase -> what a call of the original costs.
    """

    device: str
    usual_s: float
    making_s: float
    original: Mapping[Phase, PhaseProfile]

    def seconds(self, trial: Trial, compilations: int = 1) -> float:
        """Expected seconds of a trial.

        Args:
            compilations: how many times what it compiles is compiled in the end.
        """
        if self.device == "cpu":
            return (self.usual_s or 1.0) * (LONG_TRIAL if any(map(is_foreign, trial.transforms)) else 1.0)
        compiled = [phase for t in trial.transforms if t.stage is Stage.COMPILE for phase in t.phases]
        compiling_s = COMPILING_S * sum(self.original[phase].operator_count for phase in compiled)
        return (self.usual_s or 1.0) + self.making_s + compilations * compiling_s

    def worth(self, trial: Trial, offer: CalledStep, compilations: int) -> float:
        """Expected log speed-up of a request for each second of a trial. Each failure of the step halves it."""
        promised = 1 / (1 - offer.share + offer.share / (trial.predicted or 1.0))
        seconds = self.seconds(trial, compilations) * 2**offer.failures
        return min(worth(transform, promised, seconds) for transform in trial.transforms)


def first_of(offers: list[CalledStep], pace: Pace, min_gain: float) -> PolicyStep:
    """Return the step to take.

    On a GPU, every later change compiles anew what is compiled. So compiling counts once more for each other step that
    promises something: it comes last where the budget has room for all, and first where it gains much more.

    Args:
        min_gain: least gain of a phase that is worth having.
    """
    promising = [offer.is_early and offer.promised >= 1 + min_gain for offer in offers]

    def rank(offer: CalledStep) -> tuple[bool, float]:
        compilations = 1 + sum(wanted for other, wanted in zip(offers, promising, strict=True) if other is not offer)
        return offer.is_early, max(pace.worth(trial, offer, compilations) for trial in offer.trials)

    return max(offers, key=rank).step


def share(state: SearchState, phase: Phase) -> float:
    """Share of a request's time that the current variant spends in a phase; 1 if the workload is unknown."""
    spent_s = request_s(state)
    return spent_s[phase] / sum(spent_s.values()) if spent_s else 1.0


def request_s(state: SearchState) -> Mapping[Phase, float]:
    """Seconds of a request of the workload in each phase, by the current variant; empty if it is unknown."""
    if (work := state.variant.workload) is None:
        return {}
    phases = state.profile.phases
    return {"prefill": phases["prefill"].seconds, "decode": (work.new_tokens - 1) * phases["decode"].seconds}


def stages(step: PolicyStep) -> set[Stage]:
    """The stages of a step's choices."""
    return {make(choice).stage for choice in step.choices}


def only_compiles(step: PolicyStep) -> bool:
    """Whether compiling is all that a step does."""
    return stages(step) == {Stage.COMPILE}


def gained_nothing(trial: Trial) -> bool:
    """Whether a trial was timed and was no faster."""
    return trial.latency is not None and trial.latency.verdict is Verdict.FAIL


def slow_prefill_of(trial: Trial) -> Transform | None:
    """A trial's weights for prefill, if they were tried alone, are good enough and gained no time; else None."""
    alone = trial.target == "prefill" and not trial.others and trial.transform.stage is Stage.WEIGHTS
    passed = trial.quality is not None and trial.quality.verdict is Verdict.PASS
    return trial.transform if alone and passed and gained_nothing(trial) else None
