"""Pure decisions about a candidate before it is tried, from the diagnosis and the roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .. import transforms
from ..diagnose.costs import Profile
from ..diagnose.diagnosis import Diagnosis
from ..errors import Blocker
from ..machine import gpus
from ..machine.hardware import Hardware
from ..runtime.variant import Transform, Variant, divided
from ..validate.limits import Limits
from ..workload import Phase
from . import rehearsal
from .budget import GrowingBudget
from .plan import Trial, TrialOutcome
from .policy import Choice, Policy, PolicyStep

USABLE_SHARE = 0.9  # of free memory; 10 % is kept for activations and the allocator's slack
LEAST_LEFT = 0.05  # least share of a phase's time that an exchange leaves; the two predictions are not more exact


@dataclass(frozen=True)
class SearchState:
    """The best variant so far and what is known about it.

    Args:
        obstacle: why no transform at all is available for this model, or None.
    """

    variant: Variant
    profile: Profile
    diagnoses: Mapping[Phase, Diagnosis]
    free_bytes: float = math.inf
    obstacle: str | None = None


def make(choice: Choice) -> Transform:
    return transforms.make(choice.transform, choice.params, choice.phase)


def parameter_count(original: Variant, policy: Policy) -> int | None:
    """Number of a model's parameters, or None if neither the budget nor a step of the policy depends on it."""
    if not isinstance(policy.budget_s, GrowingBudget) and all(step.parameters is None for step in policy.steps):
        return None
    return sum(parameter.numel() for parameter in original.original.parameters())


def why_not(
    step: PolicyStep, diagnoses: Mapping[Phase, Diagnosis], hardware: Hardware, parameters: int | None = None
) -> str | None:
    """Why a step is not called for, or None.

    Args:
        parameters: number of the model's parameters; None: unknown, so every size is accepted.
    """
    if step.devices and hardware.device not in step.devices:
        return f"only for {', '.join(sorted(step.devices))}; this machine has {hardware.device}"
    found_gpu = gpus.capability(hardware)
    if step.capabilities and not (found_gpu and any(wanted.admits(found_gpu) for wanted in step.capabilities)):
        this = gpus.name(found_gpu) if found_gpu else hardware.device
        return f"only for GPUs of {' or '.join(map(str, step.capabilities))}; this machine has {this}"
    if step.parameters is not None and parameters is not None and not step.parameters.admits(parameters):
        return f"for models of {step.parameters} parameters, this has {parameters:.3g}"
    found = diagnoses[step.phase].bottleneck
    if step.bottlenecks and step.bottlenecks.isdisjoint((found, *diagnoses[step.phase].perhaps)):
        if found == "capacity":
            return f"there is no memory for it: {diagnoses[step.phase].evidence}"
        return f"{step.phase} is {found}-bound; this helps where it is {' or '.join(sorted(step.bottlenecks))}-bound"
    return None


def promise(
    transform: Transform,
    phase: Phase,
    state: SearchState,
    hardware: Hardware,
    *,
    replaced: Transform | None = None,
    before: SearchState | None = None,
) -> float | None:
    """Predicted best-case speed-up of `phase`, or None if the transform is unavailable.

    Args:
        state: the state that the speed-up is relative to.
        replaced: a transform in `state` whose place it would take.
        before: the original; needed with `replaced`, because both transforms are predicted on it.
    """
    base = before if replaced is not None and before is not None else state
    if unavailable(transform, base.variant, hardware, base.obstacle) is not None:
        return None
    own = expect(transform, phase, base, hardware)
    if replaced is None:
        return own
    return exchange(own, expect(replaced, phase, base, hardware), phase, base, state)


def unavailable(transform: Transform, variant: Variant, hardware: Hardware, obstacle: str | None = None) -> str | None:
    """Why a transform is unavailable, or None.

    Args:
        obstacle: why no transform is available for this model, if known.
    """
    reason = obstacle or variant.state.obstacle() or divided(transform, variant.original)
    if variant.workload is not None and variant.workload.new_tokens == 1 and transform.phases == ("decode",):
        reason = reason or "the workload asks for one new token, which prefill gives: nothing is decoded"
    reason = reason or transform.unavailable(variant, hardware)
    return reason or rehearsal.obstacle(variant.original, transform, hardware)


def expect(transform: Transform, phase: Phase, state: SearchState, hardware: Hardware) -> float:
    """Predicted best-case speed-up of `phase`, assuming that the transform is available.

    Raises:
        ValueError: it predicts no speed-up that could be compared.
    """
    gain = float(transform.predict(state.profile, hardware).get(phase, 1.0))
    if not gain >= 0:
        raise ValueError(f"predicted {gain} times as fast for {phase}")
    return gain


def exchange(own: float, replaced: float, phase: Phase, before: SearchState, now: SearchState) -> float:
    """Predicted best-case speed-up of `phase` over the current variant if one transform replaces another.

    The phase's time with each of the two is predicted on the original. The difference is subtracted from the phase's
    current time.

    Args:
        own, replaced: speed-up of the original's phase that each promises.
        before: the original.
        now: the current state, which contains the replaced transform.
    """
    was_s, now_s = before.profile.phases[phase].seconds, now.profile.phases[phase].seconds
    saved_s = was_s / replaced - was_s / own
    return now_s / max(now_s - saved_s, LEAST_LEFT * now_s)


def worth(transform: Transform, promised: float, cost: float) -> float:
    """The worth of trying a transform: expected log speed-up for what the trial costs.

    A lossless transform passes the quality gate unless something is wrong; of those with narrower numbers about half
    pass.

    Args:
        promised: speed-up of a whole request.
        cost: time of the trial, in the same unit for all that are compared.
    """
    chance = 0.9 if transform.lossless else 0.5
    return chance * math.log(max(promised, 1.0)) / cost


def jointly(first: float, second: float) -> float:
    """Predicted best-case speed-up of two transforms that save different parts of a phase's time."""
    return 1 / max(1 / first + 1 / second - 1, LEAST_LEFT)


def rule_out(trial: Trial, phase: Phase, state: SearchState, limits: Limits, hardware: Hardware) -> Trial | None:
    """Settle a trial without a run (unavailable, or cannot win). Returns None if it has to be tried."""
    missing, predicted = None, trial.predicted
    if predicted is None:
        missing = unavailable(trial.transform, state.variant, hardware, state.obstacle) or "not available"
        if not isinstance(missing, Blocker):
            return replace(trial, outcome=TrialOutcome.UNAVAILABLE, reason=missing)
        predicted = expect(trial.transform, phase, state, hardware)  # what the missing requirement costs
    if at_best(trial.transform, predicted, phase, state, hardware) < 1 + limits.min_gain:
        reason = f"the roofline allows {predicted:.2f}x at best, {1 + limits.min_gain:.2f}x is the least worth having"
        return replace(trial, outcome=TrialOutcome.SKIPPED, reason=reason, predicted=predicted)
    if missing is not None:
        return replace(trial, outcome=TrialOutcome.BLOCKED, reason=str(missing), predicted=predicted)
    if (excess := outgrows(trial.transform, state.variant, state.free_bytes)) is not None:
        return replace(trial, outcome=TrialOutcome.BLOCKED, reason=excess)
    return None


def at_best(transform: Transform, predicted: float, phase: Phase, state: SearchState, hardware: Hardware) -> float:
    """A predicted speed-up. If measuring the peaks was disturbed, scale it to the highest possible peaks."""
    if not hardware.disturbed or not predicted:
        return predicted
    return predicted * expect(transform, phase, state, hardware.at_best()) / expect(transform, phase, state, hardware)


def outgrows(transform: Transform, variant: Variant, free_bytes: float) -> str | None:
    """Why a transform does not fit into free memory, or None."""
    needed, free = transform.extra_bytes(variant), USABLE_SHARE * free_bytes
    if needed <= free:
        return None
    return (
        f"it takes {needed / 1e9:.3g} GB beside what serves now, and {free / 1e9:.3g} GB of memory are free (the "
        "original stays, since each trial is compared with it); a shorter workload makes room, or "
        "keep_original=False once something smaller is committed"
    )


def tier_for(candidate: Variant, policy: Policy) -> str:
    """The tier to judge a candidate by. A variant of only lossless transforms must be lossless under any policy."""
    return "lossless" if all(t.lossless for t in candidate.transforms) else policy.tier
