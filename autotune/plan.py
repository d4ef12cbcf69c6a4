"""A plan: the transforms that won, what they won, and for exactly which model, machine and libraries."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .transforms import Transform
from .validate import Latency, Quality


class Outcome(enum.StrEnum):
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    SKIPPED = "skipped"
    UNAVAILABLE = "unavailable"
    ERROR = "error"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Trial:
    """One candidate and what became of it.

    Args:
        transform: the candidate.
        step: name of the policy step.
        target: the phase it should speed up.
        outcome: what became of it.
        reason: one sentence with numbers.
        predicted: best-case speed-up of the target phase from the roofline.
        quality: against the original; None when it did not come to that.
        latency: against the variant accepted before; None when it did not come to that.
        seconds: time spent on it, compilation included.
        compile_s: share of that spent applying and compiling.
    """

    transform: Transform
    step: str
    target: str
    outcome: Outcome
    reason: str
    predicted: float | None = None
    quality: Quality | None = None
    latency: Latency | None = None
    seconds: float = 0.0
    compile_s: float = 0.0


@dataclass(frozen=True)
class Fingerprint:
    """What a plan is valid for; any difference makes it a miss.

    Args:
        model: hash of configuration and weights.
        hardware: device, name, capability, threads.
        versions: torch, transformers, autotune, ... by name.
        workload: hash of the workload's shape.
        policy: policy name and content hash.
        tier: quality tier.
    """

    model: str
    hardware: str
    versions: Mapping[str, str]
    workload: str
    policy: str
    tier: str


@dataclass(frozen=True)
class Plan:
    """Transforms in order of application, with the figures that justified them. An empty plan keeps the original."""

    fingerprint: Fingerprint
    transforms: tuple[Transform, ...]
    quality: Quality | None = None  # the whole plan against the original, on held-out prompts
    latency: Latency | None = None  # the whole plan against the original, on held-out prompts
    trials: tuple[Trial, ...] = ()  # everything that was considered, accepted or not
    created: str = ""  # ISO 8601, UTC
    summary: Mapping[str, Any] = field(default_factory=dict)  # the report's dictionary at the time
