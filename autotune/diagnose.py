"""From a profile to a verdict: what limits each phase, the evidence, and how much faster it could become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .workload import Phase

Bottleneck = Literal["compute", "memory", "kv-cache", "overhead", "sync", "capacity", "mixed"]


@dataclass(frozen=True)
class Diagnosis:
    """What limits one phase.

    Args:
        phase: "prefill" or "decode".
        bottleneck: the dominant limit.
        evidence: one sentence with the numbers that decided it.
        ceiling: how many times faster the phase could become at best with its present bytes and FLOPs.
        roofline_share: roofline floor / measured time, 0 to 1.
    """

    phase: Phase
    bottleneck: Bottleneck
    evidence: str
    ceiling: float
    roofline_share: float
