"""The contract of a transform, and the one door through which all of them come.

A transform is a frozen dataclass whose fields are its parameters. It edits a `Variant`, never the original, and never
writes into a tensor it did not create: tensors are shared with the original. Built-ins (the modules of this package)
and third parties (entry-point group `autotune.transforms`) are found by `registry()` alike.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from ..hardware import Hardware
    from ..profile import Profile
    from ..variant import Variant
    from ..workload import Phase


class Stage(enum.IntEnum):
    """Order in which the transforms of a plan are applied; it replaces pairwise compatibility lists."""

    WEIGHTS = 1
    ATTENTION = 2
    CACHE = 3
    LOOP = 4
    COMPILE = 5
    GRAPH = 6
    THREADS = 7


@dataclass(frozen=True)
class Transform:
    """One optimisation.

    Args:
        phase: which phase's module it edits: "prefill", "decode" or "both".
    """

    phase: Literal["prefill", "decode", "both"] = "both"

    name: ClassVar[str]
    stage: ClassVar[Stage]
    summary: ClassVar[str]  # one line for `autotune transforms`
    lossless: ClassVar[bool] = False  # judged at the lossless tier whatever the policy's tier is

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        """Why it cannot be tried on this variant and machine, or None. Cheap; raises nothing."""
        return None

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best-case speed-up per phase it touches, from the roofline: {"decode": 2.1}. Optimistic, never pessimistic."""
        raise NotImplementedError

    def apply(self, variant: Variant) -> None:
        """Edit the variant. Raises TransformError for an expected refusal; anything else counts as a crash."""
        raise NotImplementedError

    def took_effect(self, variant: Variant) -> str | None:
        """None when the variant really changed (modules replaced, graph captured, kernel used), else what is missing."""
        raise NotImplementedError

    @property
    def phases(self) -> tuple[Phase, ...]:
        return ("prefill", "decode") if self.phase == "both" else (self.phase,)

    @property
    def params(self) -> dict[str, Any]:
        """Parameters other than the phase, JSON-ready."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "phase"}

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.params.items())
        return f"{self.name}({inner})@{self.phase}" if inner else f"{self.name}@{self.phase}"
