"""Arms: what an experiment compares, from whatever a caller has at hand to variants that can be run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ExperimentError

if TYPE_CHECKING:
    from ..variant import Variant
    from . import Experiment

CONTROL = "control"  # the control's name among the arms
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Arm:
    """One thing that is compared.

    Args:
        name: "control", or the candidate's.
        description: what it is, in words.
        variant: what runs; None where it could not be built.
        fingerprint: hash of what it computes; another one is another arm, whose observations are not mixed.
        problem: why it cannot be run, or None.
        unjudged: why its quality cannot be compared with the control's (another tokenizer), or None.
        notes: what a reader should know, such as how much memory both models take.
    """

    name: str
    description: str
    variant: Variant | None
    fingerprint: str
    problem: str | None = None
    unjudged: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Given:
    """What a caller gave for an arm, and which kind of thing it is."""

    name: str
    kind: str  # "variant", "transforms", "plan", "plan file", "policy", "model" or "checkpoint"
    value: Any


def checked_name(name: str) -> str:
    """An experiment's or an arm's name.

    Raises:
        ExperimentError: it is none.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ExperimentError(f'the name {name!r} cannot be used; expected up to 64 letters, digits, ".", "_" or "-"')
    return name


def parse(control: Any, candidates: Mapping[str, Any]) -> tuple[Given, dict[str, Given]]:
    """What was given, checked as far as that goes without a model."""
    raise NotImplementedError


def build(experiment: Experiment, notify: Callable[[str], None]) -> tuple[Arm, ...]:
    """The control and the candidates as variants."""
    raise NotImplementedError
