"""Policies as data: what to optimise for, within which limits, and which transforms to try when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .workload import Phase


@dataclass(frozen=True)
class Limits:
    """What must not get worse. Fractions: 0.05 allows 5 %.

    Args:
        min_gain: a step must gain at least this on the phase it targets.
        max_ttft_increase, max_tpot_increase, max_p90_increase: against the original, in every workload bucket.
        max_memory_ratio: peak weights + cache of the variant / the original's.
    """

    min_gain: float = 0.03
    max_ttft_increase: float = 0.05
    max_tpot_increase: float = 0.05
    max_p90_increase: float = 0.10
    max_memory_ratio: float = 2.0


@dataclass(frozen=True)
class Choice:
    """One transform a step may try."""

    transform: str
    params: dict[str, Any] = field(default_factory=dict)
    phase: Literal["prefill", "decode", "both"] = "both"


@dataclass(frozen=True)
class Step:
    """One question: given this bottleneck here, which of these helps?

    Args:
        name: what the step is about, for reports ("smaller weights").
        phase: the phase whose latency the step must improve.
        bottlenecks: diagnoses under which it is tried; empty: any.
        devices: device types it is for; empty: any.
        choices: candidates; the tuner orders them by predicted gain and stops when the rest cannot win.
    """

    name: str
    phase: Phase
    choices: tuple[Choice, ...]
    bottlenecks: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Policy:
    """How to tune.

    Args:
        name: "balanced", "latency", "throughput", "memory", "lossless" or a user's own.
        description: one sentence.
        objective: "latency" (end to end of a request), "throughput" (tokens/s over batch sizes) or "memory".
        tier: quality tier, "lossless", "strict", "relaxed" or "aggressive".
        limits: what must not get worse.
        budget_s: tuning time in seconds.
        steps: in the order in which they are considered.
        source: file it came from.
    """

    name: str
    description: str
    objective: Literal["latency", "throughput", "memory"]
    tier: str
    limits: Limits
    budget_s: float
    steps: tuple[Step, ...]
    source: str = ""
