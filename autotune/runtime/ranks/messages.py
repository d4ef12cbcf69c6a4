"""What the first rank of a model sends to the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["sample", "forward"]


@dataclass(frozen=True)
class Job:
    """A call that every rank runs.

    Args:
        kind: of `dispatch.sample`, or of `dispatch.forward`.
        transforms: of the variant that runs it; none: the original.
        arguments: of the call, `packed`.
        alone: whether each rank runs it by itself, without collectives, to find out whether it can.
    """

    kind: Kind
    transforms: tuple[Any, ...]
    arguments: bytes
    alone: bool = False


@dataclass(frozen=True)
class Question:
    """What every rank answers about itself, by the name of the answer."""

    name: str


@dataclass(frozen=True)
class Done:
    """The last message: what the first rank came to, or why it failed."""

    value: Any = None
    error: str | None = None
