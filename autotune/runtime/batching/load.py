"""What an engine has to do, and what it has done, as numbers."""

from __future__ import annotations

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
