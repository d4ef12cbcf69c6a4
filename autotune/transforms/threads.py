"""The number of threads that compute a phase."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..diagnose import ceilings
from ..errors import ChoiceError
from ..machine import intraop
from ..runtime.variant import Stage, Transform

if TYPE_CHECKING:
    from ..diagnose.costs import PhaseProfile, Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

REGION_S = 3e-6  # seconds that an OpenMP library takes to wake and join the threads of a parallel region


@dataclass(frozen=True)
class Threads(Transform):
    """Compute a phase with `count` intra-op threads. The process's own number is restored after each call.

    Args:
        count: number of threads, from 1 to the number of cores this process may use.
    """

    count: int = 1

    name: ClassVar[str] = "threads"
    stage: ClassVar[Stage] = Stage.THREADS
    summary: ClassVar[str] = "another number of CPU threads for a phase"
    sharded: ClassVar[bool] = True
    lossless: ClassVar[bool] = True
    sets: ClassVar[str] = "threads"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ChoiceError(f"threads: count must be at least 1, not {self.count}")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device != "cpu":
            return f"threads compute on a CPU; this model runs on {hardware.device}"
        if not intraop.is_settable():
            return "this build of torch has no way to set the threads of one call without those of others"
        if self.count > (cores := usable_cores()):
            return f"{self.count} threads on {cores} cores would wait for one another"
        if all(variant.threads.get(phase, torch.get_num_threads()) == self.count for phase in self.phases):
            return f"{' and '.join(self.phases)} on {self.count} threads is what runs already"
        return None

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        return {phase: self._speedup(profile.phases[phase], hardware) for phase in self.phases}

    def _speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        """Best case: with more threads, time falls in proportion; with fewer, no operator starts a parallel region."""
        if self.count > hardware.threads:
            return self.count / hardware.threads
        return ceilings.fewer_threads(phase, hardware, self.count, phase.matmul_count * REGION_S)

    def apply(self, variant: Variant) -> None:
        variant.threads |= dict.fromkeys(self.phases, self.count)

    def took_effect(self, variant: Variant) -> str | None:
        for phase in self.phases:
            with variant.running(phase):
                if (threads := torch.get_num_threads()) != self.count:
                    return f"{phase} runs on {threads} threads instead of {self.count}"
        return None


def usable_cores() -> int:
    """The number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
