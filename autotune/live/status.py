"""The state of a wrapped model."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..runtime.batching.load import EngineLoad
from .original import Residence

if TYPE_CHECKING:
    from ..runtime.speculation.speculate import GuessCounts


class State(enum.StrEnum):
    """What a wrapped model is doing, or why its plan does not serve."""

    OBSERVING = "observing"  # counting calls
    WAITING = "waiting"  # for `.tune()`
    TUNING = "tuning"  # a proven variant, named by `Status.transforms`, may serve meanwhile
    TUNED = "tuned"
    ORIGINAL = "original"  # kept: nothing better was proven, or nothing could be tried
    ROLLED_BACK = "rolled back"
    STALE = "stale"  # the model changed
    FAILED = "failed"  # tuning or the plan failed
    PASSED_THROUGH = "passed through"  # calls cannot be routed with the installed versions


@dataclass(frozen=True)
class Status:
    """The state of a wrapped model.

    Args:
        state: what it is doing; equal to its value: `state == "tuned"`.
        detail: one more sentence about the state.
        transforms: the transforms of the plan that serves, in words.
        served: number of calls that the plan served.
        bypassed: number of calls that the plan could not serve, by reason. The original served them, or, if its weights
            were released, the plan's layers in transformers' loop.
        original: where the original's weights are: "resident", "parked" in the host's memory, or "released".
        speculation: counts of guessed tokens; None if the plan does not guess.
        watch: what is watched about the committed plan and what was seen, in a sentence.
        batching: how many callers' sequences are decoded together and wait, in a sentence; empty if none are.
        waiting: number of requests that wait for a row or for their turn.
        load: what decodes callers' sequences together has to do and has done, as numbers.
        resting: whether the circuit breaker has taken the plan out of service.
    """

    state: State
    detail: str
    transforms: tuple[str, ...] = ()
    served: int = 0
    bypassed: Mapping[str, int] = field(default_factory=dict)
    original: Residence = Residence.RESIDENT
    speculation: GuessCounts | None = None
    watch: str = ""
    batching: str = ""
    waiting: int = 0
    load: EngineLoad = field(default_factory=EngineLoad)
    resting: bool = False
