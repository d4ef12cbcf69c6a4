"""What advice is given about, the variant that serves now, and what it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..diagnose.diagnosis import FULL, Bottleneck
from ..report import numbers as n
from ..workload import Phase

if TYPE_CHECKING:
    from ..diagnose.costs import Profile, ScalePoint
    from ..machine.hardware import Hardware


@dataclass(frozen=True)
class Advice:
    """One thing that the user could change.

    Args:
        change: the change, as a noun phrase.
        speedups: metric concerned ("ttft", "tpot", or "throughput": tokens per second of all sequences together) ->
            predicted speed-up; None if the change would bring little or nothing.
        because: the numbers that the prediction follows from, and their sources.
        assumes: further assumptions, as a clause after "assumes that"; empty if there are none.
    """

    change: str
    speedups: Mapping[str, float | None]
    because: str
    assumes: str = ""


@dataclass(frozen=True)
class ServingVariant:
    """The variant that serves now.

    Args:
        profile: profile of the variant.
        hardware: this machine, measured.
        bottlenecks: what limits each phase; a phase that was not diagnosed is missing.
        operators: number of operators that the original dispatches per call or token, by phase.
    """

    profile: Profile
    hardware: Hardware
    bottlenecks: Mapping[Phase, Bottleneck]
    operators: Mapping[Phase, int]

    def sequence_bytes(self) -> float:
        """Bytes of one sequence's cache and activations."""
        memory = self.profile.memory
        return (memory.cache_bytes + memory.activations_bytes) / self.profile.batch

    def room(self) -> float:
        """Number of sequences that fit into memory beside the weights."""
        free = FULL * self.hardware.memory_bytes - self.profile.memory.weights_bytes
        return max(0, free // self.sequence_bytes()) if self.sequence_bytes() else float("inf")

    def rest_of_cache(self, point: ScalePoint) -> tuple[float, float]:
        """Bytes of a sequence's cache beyond the context of `point`, and seconds to read them at decode's rate."""
        decode = self.profile.phases["decode"]
        beyond = max(0.0, 1 - point.context / self.profile.prompt_tokens)
        missing = beyond * decode.cache_bytes / self.profile.batch
        return missing, missing * decode.seconds / decode.moved_bytes if missing else 0.0

    def throughput(self, point: ScalePoint) -> float:
        """Tokens per second at a measured batch size, with the cache of the workload's context."""
        return point.batch / (point.seconds_per_step + point.batch * self.rest_of_cache(point)[1])


def ms(seconds: float) -> str:
    return f"{n.milliseconds(1e3 * seconds)} ms"
