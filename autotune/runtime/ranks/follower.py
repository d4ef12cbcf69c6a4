"""The ranks that do as the first one does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...errors import TransformError, in_words
from ...machine import outside
from ...model import sharding
from .. import dispatch
from . import step
from .line import Line, unpacked
from .messages import Done, Job, Question

if TYPE_CHECKING:
    from ..variant import Transform, Variant

log = logging.getLogger("autotune")

KEPT = 3  # variants that a rank keeps: the incumbent, the candidate, and a part of one; others are built again


def follow(original: Variant, line: Line, answers: Mapping[str, Callable[[], Any]]) -> Done:
    """Run what the first rank runs, until it is done.

    Args:
        original: this rank's variant without transforms.
        answers: name of a question -> gives this rank's answer.

    Raises:
        RuntimeError: the first rank ended, or sent nothing for longer than the line waits.
    """
    built: dict[tuple[Transform, ...], Variant] = {(): original}
    while not isinstance(message := line.receive(), Done):
        if isinstance(message, Question):
            line.gather(answers[message.name]())
        else:
            line.gather(_failure(message, original, built))
    return message


def perform(variant: Variant, job: Job) -> None:
    """Run a job with the variant of its transforms.

    Raises:
        TransformError: the variant was to be run for the first time, and a transform had no effect.
        Whatever the variant raises.
    """
    model = variant.original
    with torch.no_grad(), sharding.alone(model) if job.alone else nullcontext():
        if job.alone and (missing := next(filter(None, (t.took_effect(variant) for t in job.transforms)), None)):
            raise TransformError(f"it had no effect: {missing}")
        given = unpacked(job.arguments, model.device)
        if job.kind == "sample":
            call = replace(given, model=model)
            (dispatch if job.alone else step).sample(variant, call)
        else:
            (dispatch if job.alone else step).forward(variant, model, *given)


def _failure(job: Job, original: Variant, built: dict[tuple[Transform, ...], Variant]) -> str | None:
    """Run a job. Returns what it raised, in words, or None."""
    try:
        if job.transforms not in built:
            built[job.transforms] = original.with_transforms(job.transforms)
        perform(built[job.transforms], job)
    except Exception as error:  # foreign code, as in a trial; the first rank decides what it means
        outside.pass_on(error)
        log.debug("a call of the first rank failed here", exc_info=True)
        built.pop(job.transforms, None)
        built[()] = original
        return in_words(error)
    for transforms in [each for each in built if each][:-KEPT]:
        del built[transforms]
    return None
