"""Builds the variant that a trial is about: the incumbent with the trial's transforms added, or in place of others."""

from __future__ import annotations

from ..errors import TransformError
from ..runtime.variant import Variant
from .plan import Trial


class NeededError(TransformError):
    """Another transform of the plan needs the one that was to be replaced."""


def assemble(trial: Trial, incumbent: Variant) -> Variant:
    """Build the variant that a trial is about.

    Replacements take the place of the first that they replace, so they come before what shares its layers.

    Raises:
        TransformError: one of the trial's transforms refuses, or another one, which needs what is replaced.
    """
    if not trial.instead_of:
        return incumbent.with_transforms(trial.transforms)
    chain = list(incumbent.transforms)
    place = next((n for n, transform in enumerate(chain) if transform in trial.instead_of), len(chain))
    chain[place:place] = trial.transforms
    kept = sorted((transform for transform in chain if transform not in trial.instead_of), key=lambda t: t.stage)
    for transform in kept:
        if error := next(filter(None, map(transform.excludes, trial.transforms)), None):
            raise NeededError(f"the plan's {transform} needs what it would replace: {error}")
    variant = incumbent.bare()
    for transform in kept:
        try:
            variant = variant.with_transform(transform)
        except TransformError as error:
            if transform in trial.transforms:
                raise
            raise NeededError(f"the plan's {transform} needs what it would replace: {error}") from error
    return variant
