"""Where a wrapped model stands."""

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
    """Where a wrapped model stands.

    Args:
        state: "observing" (counting calls), "waiting" (for `.tune()`), "tuning" (what `transforms` names is proven and
            serves meanwhile), "tuned", "original" (kept: nothing better was proven, or nothing could be tried),
            "rolled back", "stale" (the model changed), "failed" (tuning or the plan failed) or "passed through" (calls
            cannot be routed with the installed versions).
        detail: one sentence more.
        transforms: the plan that serves, in words.
        served: calls served by the plan.
        bypassed: calls that the plan could not serve, by reason; the original did, or without its weights the layers
            that the model took over.
        original: where the original's weights are: "resident", "parked" in the host's memory, or "released".
        speculation: what became of guessed tokens; None where the plan guesses none.
        watch: what is watched of the plan that was committed, and what was seen, in a sentence.
    """

    state: State
    detail: str
    transforms: tuple[str, ...] = ()
    served: int = 0
    bypassed: Mapping[str, int] = field(default_factory=dict)
    original: Literal["resident", "parked", "released"] = "resident"
    speculation: Tally | None = None
    watch: str = ""
