"""When a canary's plan is promoted or rolled back, and what a replica does next. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...compare.experiment import guardrails
from ...compare.experiment.guardrails import Figures, Finding, Guardrail
from ...compare.experiment.ramp import Ramp, RampProgress, RampState
from ...compare.experiment.sequential import Moments
from ...report.numbers import duration
from ...validate import Verdict

FAILURES, TTFT, TPOT = "failures", "ttft", "tpot"  # names of the guardrails


class RolloutState(enum.StrEnum):
    """What became of a plan on offer."""

    CANARY = "canary"  # one replica verifies it, or serves with it
    PROMOTED = "promoted"  # all replicas serve with it where it holds
    ROLLED_BACK = "rolled back"


@dataclass(frozen=True)
class CanaryRules:
    """Limits of a canary.

    Args:
        slower: fraction by which its times to the first token and per token may exceed the other replicas'.
        failing: difference by which its share of failed answers may exceed the others'.
        requests: least number of its answers before it is promoted.
        patience_s: seconds after which a plan that is not proven to be within the limits is rolled back.
        again_s: seconds after which a replica on which the promoted plan did not hold verifies it again: noise may have
            hidden that it does.
    """

    slower: float = 0.10
    failing: float = 0.02
    requests: int = 50
    patience_s: float = 24 * 3600.0
    again_s: float = 600.0

    @property
    def rails(self) -> tuple[Guardrail, ...]:
        """The limits as guardrails of an experiment."""
        return (
            Guardrail(FAILURES, "rate", self.failing),
            Guardrail(TTFT, "ratio", self.slower),
            Guardrail(TPOT, "ratio", self.slower),
        )

    def ramp(self, share: float = 1.0) -> Ramp:
        """The experiment's ramp, of a single step: the router decides how many requests the canary gets.

        Args:
            share: fraction of the answers that are the canary's, above 0. Only the ramp's `bounds` depend on it.
        """
        return Ramp((share,), self.rails, self.requests)


@dataclass(frozen=True)
class Rollout:
    """A plan on its way to all replicas.

    Args:
        plan: hash of the plan's text.
        canary: id of the replica that takes it first.
        began_s: when that replica began to serve with it, or to verify it; seconds since 1970.
        serves: whether it was verified and serves.
        state, reason: what became of it, and why in a sentence.
        control, candidate: figures of the others' answers and of the canary's, by guardrail.
    """

    plan: str
    canary: str
    began_s: float
    serves: bool = False
    state: RolloutState = RolloutState.CANARY
    reason: str = "the canary verifies the plan"
    control: Mapping[str, Moments] = field(default_factory=dict)
    candidate: Mapping[str, Moments] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What distinguishes its figures from those of other rollouts."""
        return f"{self.plan}-{self.began_s:.3f}"

    @property
    def requests(self) -> int:
        """Number of the canary's answers."""
        return self.candidate.get(FAILURES, Moments()).n

    @property
    def others(self) -> int:
        """Number of the other replicas' answers."""
        return self.control.get(FAILURES, Moments()).n

    @property
    def share(self) -> float:
        """Fraction of the answers that are the canary's; 0 before the first one."""
        return self.requests / ((self.requests + self.others) or 1)

    def ended(self, state: RolloutState, reason: str) -> Rollout:
        """Return this rollout with its outcome."""
        return replace(self, state=state, reason=reason)


@dataclass(frozen=True)
class Seen:
    """What is seen of a canary.

    Args:
        at_s: when, seconds since 1970.
        control, candidate: figures so far, by guardrail.
        is_alive: whether the canary's process holds its lock.
        failure: why its plan no longer serves (it raised, or its answers drifted from the original's), or None.
    """

    at_s: float
    control: Figures = field(default_factory=dict)
    candidate: Figures = field(default_factory=dict)
    is_alive: bool = True
    failure: str | None = None


def judged(rollout: Rollout, seen: Seen, rules: CanaryRules) -> Rollout:
    """Return the rollout after a look at its canary; valid at any look. One that is over stays as it is."""
    if rollout.state is not RolloutState.CANARY:
        return rollout
    if not seen.is_alive:
        return rollout.ended(RolloutState.ROLLED_BACK, "the canary's process ended")
    rollout = replace(rollout, control=seen.control, candidate=seen.candidate)
    if seen.failure is not None:
        return rollout.ended(RolloutState.ROLLED_BACK, f"the plan failed on the canary: {seen.failure}")
    after = rules.ramp().advance(progress(rollout))
    if after.state is RampState.ROLLED_BACK:
        return rollout.ended(RolloutState.ROLLED_BACK, after.reason)
    if after.state is RampState.FULL:
        return rollout.ended(RolloutState.PROMOTED, after.reason)
    _, found = guardrails.conclude(findings(rollout, rules))
    reason = f"{rollout.requests} of at least {rules.requests} requests; {found}"
    if seen.at_s - rollout.began_s > rules.patience_s:
        reason = f"not proven within {duration(rules.patience_s)}: {reason}"
        return rollout.ended(RolloutState.ROLLED_BACK, reason)
    return replace(rollout, reason=reason)


def progress(rollout: Rollout) -> RampProgress:
    """The rollout as an experiment's progress."""
    return RampProgress(requests=rollout.requests, control=rollout.control, candidate=rollout.candidate)


def findings(rollout: Rollout, rules: CanaryRules) -> list[Finding]:
    """The current finding of every guardrail."""
    return rules.ramp().findings(progress(rollout))


def verdict(rollout: Rollout) -> Verdict:
    """The experiment's verdict on the plan."""
    over = {RolloutState.PROMOTED: Verdict.PASS, RolloutState.ROLLED_BACK: Verdict.FAIL}
    return over.get(rollout.state, Verdict.INCONCLUSIVE)


class Duty(enum.Enum):
    """What a replica does next."""

    NOTHING = enum.auto()
    TRY = enum.auto()  # be the canary of the plan on offer, if no other replica is
    JUDGE = enum.auto()  # it is the canary
    COMPARE = enum.auto()  # another replica is: publish figures, and see whether it lives
    FOLLOW = enum.auto()  # serve with the promoted plan, when no other replica verifies one


@dataclass(frozen=True)
class Sight:
    """What a replica knows.

    Args:
        replica: its id.
        is_settled: whether its own tuning is over.
        offered: hash of the plan on offer, or None.
        rollout: the latest one, or None.
        promoted: hash of the plan that was promoted last, or None.
        serves: hash of the plan that it serves with, if that came by a rollout; else None.
        refused: hashes of plans that did not hold on it a short while ago.
    """

    replica: str
    is_settled: bool
    offered: str | None = None
    rollout: Rollout | None = None
    promoted: str | None = None
    serves: str | None = None
    refused: frozenset[str] = frozenset()


def duty(sight: Sight) -> Duty:
    """What a replica does next. A rollout that is under way ends before another plan is tried."""
    rollout = sight.rollout
    if rollout is not None and rollout.state is RolloutState.CANARY:
        return Duty.JUDGE if rollout.canary == sight.replica else Duty.COMPARE
    if not sight.is_settled:
        return Duty.NOTHING
    if sight.offered is not None and (rollout is None or rollout.plan != sight.offered):
        return Duty.TRY
    if sight.promoted not in (None, sight.serves) and sight.promoted not in sight.refused:
        return Duty.FOLLOW
    return Duty.NOTHING
