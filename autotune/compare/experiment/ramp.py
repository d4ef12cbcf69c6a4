"""Ramps: the share of live requests that a candidate gets, and when it may get more. Pure."""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ...errors import ExperimentError
from ...validate import Verdict
from . import guardrails
from .guardrails import Finding, Guardrail, stated_bound
from .sequential import Moments

ALPHA = 0.05  # chance that one run of a ramp ever rolls back a candidate that is within every limit


class RampState(enum.StrEnum):
    """What a ramp is doing."""

    RAMPING = "ramping"
    FULL = "full"  # the last step was passed; guardrails still watch
    ROLLED_BACK = "rolled back"


@dataclass(frozen=True)
class RampProgress:
    """The state of a ramp. All of it is saved across restarts.

    Args:
        step: index into the ramp's shares.
        state: what the ramp is doing.
        reason: why the ramp is in this step and state, in a sentence.
        requests: number of the candidate's requests in this step.
        rollbacks: number of roll-backs so far.
        control, candidate: figures of this step by guardrail. At a share of 1 the control serves no requests, so its
            figures are those of the step before.
    """

    step: int = 0
    state: RampState = RampState.RAMPING
    reason: str = "begun"
    requests: int = 0
    rollbacks: int = 0
    control: Mapping[str, Moments] = field(default_factory=dict)
    candidate: Mapping[str, Moments] = field(default_factory=dict)

    @property
    def turns(self) -> int:
        """Number of roll-backs and resumptions so far: of two processes' progress, the one with more is the later."""
        return 2 * self.rollbacks - (self.state is RampState.ROLLED_BACK)


@dataclass(frozen=True)
class Ramp:
    """The rules of a ramp.

    Every step begins with empty figures, so that requests are compared with those served at the same time and not with
    those of another time of day. The chance of an error is divided among steps and guardrails (Bonferroni).

    Args:
        shares: rising shares of requests.
        rails: guardrails that must hold.
        step_requests: least number of the candidate's requests in a step; doubled by every roll-back (back-off).

    Raises:
        ExperimentError: the shares do not rise from above 0 to at most 1, or `step_requests` is below 1.
    """

    shares: tuple[float, ...]
    rails: tuple[Guardrail, ...]
    step_requests: int = 50

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.shares, self.shares[1:], strict=False))
        if not self.shares or not rising or not 0 < self.shares[0] <= self.shares[-1] <= 1:
            raise ExperimentError(f"the ramp is {self.shares}; expected shares that rise, above 0 and at most 1")
        if self.step_requests < 1:
            raise ExperimentError(f"step_requests is {self.step_requests}; expected 1 or more")

    @property
    def alpha(self) -> float:
        """Chance of an error for one guardrail in one step."""
        return ALPHA / (len(self.shares) * len(self.rails))

    def share(self, progress: RampProgress) -> float:
        """Share of requests that the candidate gets now."""
        return 0.0 if progress.state is RampState.ROLLED_BACK else self.shares[progress.step]

    def needed(self, progress: RampProgress) -> int:
        """Least number of the candidate's requests in this step."""
        return self.step_requests << progress.rollbacks

    def findings(self, progress: RampProgress) -> list[Finding]:
        """The current finding of every guardrail."""
        empty = Moments()
        beside = {rail.name: _beside(progress, rail) for rail in self.rails}
        return [
            guardrails.judge(rail, beside[rail.name], progress.candidate.get(rail.name, empty), self.alpha)
            for rail in self.rails
        ]

    def advance(self, progress: RampProgress) -> RampProgress:
        """Return the next state: rolled back if a guardrail fails, a step up if all hold after enough requests."""
        if progress.state is RampState.ROLLED_BACK:
            return progress
        verdict, reason = guardrails.conclude(self.findings(progress))
        if verdict is Verdict.FAIL:
            return rolled_back(progress, reason)
        if verdict is not Verdict.PASS or progress.requests < self.needed(progress) or progress.state is RampState.FULL:
            return progress
        if progress.step + 1 == len(self.shares):
            return replace(progress, state=RampState.FULL, reason=reason)
        up = progress.step + 1
        control = progress.control if self.shares[up] >= 1 else {}
        return replace(progress, step=up, reason=reason, requests=0, control=control, candidate={})

    def bounds(self, progress: RampProgress) -> tuple[str, ...]:
        """For each guardrail, a sentence with the number of requests in which a clearly worse candidate is caught."""
        return tuple(self._bound(progress, rail) for rail in self.rails)

    def _bound(self, progress: RampProgress, rail: Guardrail) -> str:
        beside, std = _beside(progress, rail), _spread(progress, rail)
        if beside is None:
            return stated_bound(rail, self.alpha, std=std)
        share = self.share(progress) or self.shares[0]
        return stated_bound(rail, self.alpha, std=std, share=share, before=beside.n)

    def verdict(self, progress: RampProgress) -> tuple[Verdict, str]:
        """The current verdict on the candidate, and why."""
        if progress.state is RampState.ROLLED_BACK:
            return Verdict.FAIL, progress.reason
        if progress.state is RampState.FULL:
            return Verdict.PASS, progress.reason
        _, reason = guardrails.conclude(self.findings(progress))
        many = f"{progress.requests} of at least {self.needed(progress)} requests at {self.share(progress):.0%}"
        return Verdict.INCONCLUSIVE, f"{many}; {reason}"


def _beside(progress: RampProgress, rail: Guardrail) -> Moments | None:
    """The control's figures. None for errors: they count only if the control then answered, so it had none there."""
    return None if rail.name == "errors" else progress.control.get(rail.name, Moments())


def _spread(progress: RampProgress, rail: Guardrail) -> float:
    seen = [arm[rail.name] for arm in (progress.candidate, progress.control) if rail.name in arm]
    return next((figures.std for figures in seen if figures.n >= 20), math.nan)


def observed(
    progress: RampProgress, arm: Literal["control", "candidate"], values: Mapping[str, float | None]
) -> RampProgress:
    """Return the progress with one more answer's values."""
    if arm == "control":
        return replace(progress, control=guardrails.add(progress.control, values))
    grown = guardrails.add(progress.candidate, values)
    return replace(progress, candidate=grown, requests=progress.requests + 1)


def rolled_back(progress: RampProgress, reason: str) -> RampProgress:
    """Give the candidate no more requests. It counts as one roll-back, however often it is done."""
    more = progress.rollbacks + (progress.state is not RampState.ROLLED_BACK)
    return replace(progress, state=RampState.ROLLED_BACK, reason=reason, rollbacks=more)


def resumed(progress: RampProgress) -> RampProgress:
    """Return to the first step after a roll-back. Every roll-back doubles the requests that a step takes."""
    return RampProgress(rollbacks=progress.rollbacks, reason=f"resumed after {progress.rollbacks} roll-backs")


def place(salt: str, key: str | bytes) -> float:
    """The place of a key in [0, 1). It depends only on key and salt.

    A request goes to the candidate if its key's place is below the share. So a rising share only moves keys from the
    control to the candidate.
    """
    raw = key if isinstance(key, bytes) else key.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(raw, digest_size=8, key=hashlib.blake2b(salt.encode(), digest_size=32).digest()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # a float's 53 bits: rounding up to 1.0 cannot happen
