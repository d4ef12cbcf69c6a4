"""The state of a wrapped model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ..runtime.speculation.speculate import Tally

State = Literal[
    "observing", "waiting", "tuning", "tuned", "original", "rolled back", "stale", "failed", "passed through"
]


@dataclass(frozen=True)
class Status:
    """The state of a wrapped model.

    Args:
        state: "observing" (counting calls), "waiting" (for `.tune()`), "tuning" (a proven variant, named by
            `transforms`, may serve meanwhile), "tuned", "original" (kept: nothing better was proven, or nothing could
            be tried), "rolled back", "stale" (the model changed), "failed" (tuning or the plan failed) or "passed
            through" (calls cannot be routed with the installed versions).
        detail: one more sentence about the state.
        transforms: the transforms of the plan that serves, in words.
        served: number of calls that the plan served.
        bypassed: number of calls that the plan could not serve, by reason. The original served them, or, if its weights
            were released, the plan's layers in transformers' loop.
        original: where the original's weights are: "resident", "parked" in the host's memory, or "released".
        speculation: counts of guessed tokens; None if the plan does not guess.
        watch: what is watched about the committed plan and what was seen, in a sentence.
    """

    state: State
    detail: str
    transforms: tuple[str, ...] = ()
    served: int = 0
    bypassed: Mapping[str, int] = field(default_factory=dict)
    original: Literal["resident", "parked", "released"] = "resident"
    speculation: Tally | None = None
    watch: str = ""
