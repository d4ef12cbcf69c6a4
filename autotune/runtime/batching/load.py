"""What an engine has to do, and what it has done, as numbers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineLoad:
    """What an engine has to do now, and what it has done since it was made.

    Args:
        waiting: requests that wait for a row.
        usage: share of the slots of all rows that hold tokens, from 0 to 1.
        queried: tokens of prompts that were looked up among the beginnings of earlier ones.
        reused: those of them that were found, and not computed.
        steps: number of sequences -> decode steps that decoded so many together.
        stepped_s: number of sequences -> seconds from the beginning of those steps to what the engine did next, in all.
    """

    waiting: int = 0
    usage: float = 0.0
    queried: int = 0
    reused: int = 0
    steps: Mapping[int, int] = field(default_factory=dict)
    stepped_s: Mapping[int, float] = field(default_factory=dict)


class StepTimes:
    """Times of steps. One lasts until the engine does something else: handing its tokens to callers is part of it.

    Attributes:
        spent_s: number of sequences -> seconds of steps that decoded so many.
    """

    def __init__(self) -> None:
        self.spent_s = defaultdict[int, float](float)
        self._step: tuple[int, float] | None = None  # sequences of the latest step, and when it began

    def begin(self, together: int) -> None:
        self._step = together, time.perf_counter()

    def end(self) -> None:
        """Count the time of the latest step, if there is one that is not counted."""
        if self._step is not None:
            together, began_s = self._step
            self.spent_s[together] += time.perf_counter() - began_s
            self._step = None


def summary(counts: Mapping[str, int], found: int) -> str:
    """What an engine has done, in a sentence.

    Args:
        counts: `Engine.counts`.
        found: tokens of prompts that were known from earlier ones.
    """
    steps, evicted = counts["steps"], counts["evicted"]
    mean = f", {counts['tokens'] / steps:.1f} tokens a step" if steps else ""
    shared = f"; {found} tokens of prompts were known from earlier ones" if found else ""
    again = f", {evicted} sequences made room for more urgent ones" if evicted else ""
    return f"{steps} steps{mean}{shared}{again}"
