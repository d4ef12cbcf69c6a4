"""Composes the first draft of a plan: the most promising transforms for both phases, by diagnosis and roofline.

All predictions are from the original's profile, so a draft takes at most one transform per phase and stage. Two
transforms that save the same time would count it twice. One that saves none, but memory, comes on top where the policy
asks for no gain. Threads and guessing come later, for the remaining time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from ..errors import BudgetSpentError, DeviceError, TransformError
from ..machine import outside
from ..runtime.variant import Stage, Transform, Variant
from ..transforms import is_foreign
from ..transforms.linears import reusing
from ..workload import PHASES, Phase, Target
from .choose import SearchState, expect, make, outgrows, unavailable, why_not
from .plan import Trial, TrialOutcome
from .policy import PolicyStep
from .trying import Trier

log = logging.getLogger("autotune")

NAME = "the first draft"  # the step under which its trial is reported
# Predictions within this factor are alike: they are ceilings, and scales for groups of weights add less than that to
# 8 bits.
# So the policy's order decides between INT8 in groups and coarser INT8, whose loss takes long to read.
ALIKE = 1.1


@dataclass(frozen=True)
class DraftPart:
    """A step's transform in a draft, and the speed-up of the step's phase that it promises alone."""

    step: PolicyStep
    transform: Transform
    predicted: float


@dataclass(frozen=True)
class Draft:
    """Transforms that fit together.

    Args:
        parts: the transforms with their steps, in stage order.
        shortfalls: transform -> why its quality is too low, for transforms that promised more than those taken.
        made: holds the variant. The caller that tries it takes it out, so that nothing else keeps its memory.
    """

    parts: tuple[DraftPart, ...]
    shortfalls: dict[Transform, str]
    made: list[Variant]

    def attempts(self) -> Iterator[tuple[DraftPart, ...]]:
        """Yield the whole draft, then each phase's part. A single transform is left to its step."""
        halves = [tuple(part for part in self.parts if part.step.phase == phase) for phase in PHASES]
        if len(self.parts) > 1:
            yield self.parts
        yield from (half for half in halves if 1 < len(half) < len(self.parts))


def trial(parts: tuple[DraftPart, ...]) -> Trial:
    """Make a draft's parts a candidate."""
    phases: set[Phase] = {part.step.phase for part in parts}
    first, *others = (part.transform for part in parts)
    target: Target = "both" if len(phases) > 1 else parts[0].step.phase
    return Trial(first, NAME, target, TrialOutcome.SKIPPED, "", others=tuple(others))


def compose(state: SearchState, trier: Trier, parameters: int | None = None) -> Draft:
    """Compose the draft for a model.

    A transform that may lose quality reads the exam's texts once, and is taken only if its loss is within the tier.

    Args:
        state: the original.
        trier: gives policy, hardware and bench.
        parameters: number of the model's parameters, if a step of the policy depends on it.

    Raises:
        BudgetSpentError: the budget ended.
        DeviceError: the device is dead.
    """
    trier.notify("putting together what promises the most")
    steps = trier.policy.steps
    called = [step for step in steps if why_not(step, state.diagnoses, trier.hardware, parameters) is None]
    draft = _Drafting(state, trier)
    for step in sorted(called, key=lambda step: min(make(choice).stage for choice in step.choices)):
        draft.take(step)
    return Draft(tuple(draft.parts), draft.shortfalls, [draft.variant])


class _Drafting:
    def __init__(self, state: SearchState, trier: Trier) -> None:
        self.state = state
        self.trier = trier
        self.variant = state.variant
        self.parts = list[DraftPart]()
        self.shortfalls = dict[Transform, str]()
        self.taken = set[tuple[Phase, Stage]]()

    def take(self, step: PolicyStep) -> None:
        """Add the most promising of a step's choices that are available and keep the quality within the tier."""
        least = 1 + self.trier.policy.limits.min_gain
        choices = [transform for choice in step.choices if self.is_candidate(transform := make(choice))]
        asked = {t: gain for t in choices if (gain := self.promise(t, step)) is not None}
        promised = {t: gain for t, gain in asked.items() if self.adds_up(t, gain)}
        while promised:
            best = max(promised.values())  # of what promises about as much, the policy's first
            transform = next(t for t, gain in promised.items() if gain * ALIKE >= best)
            gain = promised.pop(transform)
            if gain < least or not self.trier.ask(transform, partial(self.fits, transform)):
                continue
            if (candidate := self.extended(transform)) is None:
                self.trier.bench.free_memory()
                continue
            self.variant = candidate
            self.parts.append(DraftPart(step, transform, gain))
            self.taken |= {(phase, transform.stage) for phase in transform.phases}
            return

    def promise(self, transform: Transform, step: PolicyStep) -> float | None:
        """Speed-up of the step's phase that a transform promises alone, or None if it raises; its step reports that."""
        return self.trier.ask(transform, lambda: expect(transform, step.phase, self.state, self.trier.hardware))

    def extended(self, transform: Transform) -> Variant | None:
        """The draft's variant with one more transform, or None if that refuses, is too large or loses too much."""
        try:
            with reusing():
                candidate = self.variant.with_transform(transform)
                if transform.took_effect(candidate) is not None or self.is_too_large(candidate):
                    return None
                return None if self.falls_short(transform) else candidate
        except TransformError:
            return None
        except (BudgetSpentError, DeviceError):
            raise
        except Exception as error:  # the search tries it alone later and reports the error
            outside.pass_on(error)
            log.debug("%s is not in the draft", transform, exc_info=True)
            self.trier.bench.describe_error(error)
            return None

    def is_candidate(self, transform: Transform) -> bool:
        return not is_foreign(transform) and transform.stage < Stage.THREADS

    def adds_up(self, transform: Transform, gain: float) -> bool:
        """Whether no part of the draft saves the same time already."""
        return gain <= 1 or self.taken.isdisjoint((phase, transform.stage) for phase in transform.phases)

    def fits(self, transform: Transform) -> bool:
        return (
            unavailable(transform, self.variant, self.trier.hardware, self.state.obstacle) is None
            and outgrows(transform, self.variant, self.state.free_bytes) is None
        )

    def is_too_large(self, candidate: Variant) -> bool:
        return self.trier.bench.memory_ratio(candidate) > self.trier.policy.limits.max_memory_ratio

    def falls_short(self, transform: Transform) -> bool:
        """Whether a transform's loss on texts read in one forward is beyond the tier. The gate gives the verdict."""
        if transform.lossless:
            return False
        original = self.state.variant  # or the draft, if the transform needs another one's layers
        base = original if transform.unavailable(original, self.trier.hardware) is None else self.variant
        probe = self.trier.bench.probe(base, transform, self.trier.policy.tier)
        if probe is None:
            return False
        if (reason := probe.shortfall("")) is not None:
            self.shortfalls[transform] = reason
        return reason is not None
