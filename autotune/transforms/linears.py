"""What the transforms that exchange linear layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .. import sites
from ..errors import TransformError
from . import Stage, Transform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from ..hardware import Hardware
    from ..profile import PhaseProfile, Profile
    from ..variant import Variant
    from ..workload import Phase


@dataclass(frozen=True)
class LinearTransform(Transform):
    """Exchanges every linear layer of a phase's module for `exchange(layer)`.

    Args:
        skip: comma-separated parts of module names whose layers stay as they are: "lm_head,down_proj".
    """

    skip: str = ""

    stage: ClassVar[Stage] = Stage.WEIGHTS
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    @property
    def kind(self) -> type[nn.Module]:
        """What a layer becomes."""
        raise NotImplementedError

    def exchange(self, linear: nn.Linear) -> nn.Module | None:
        """The layer that takes the place of `linear`, or None to leave it. Only reads `linear`."""
        raise NotImplementedError

    def missing(self) -> str | None:
        """What this process lacks to run the new layers, or None."""
        return None

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        """Best-case speed-up of one phase."""
        raise NotImplementedError

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {hardware.device}"
        if (reason := sites.obstacle(variant.original)) is not None:
            return reason
        for phase in self.phases:
            layers = sites.linears(variant.modules[phase], self.skip)
            if not layers:
                return _nothing_left(variant, phase)
            if dtypes := {layer.weight.dtype for layer in layers.values()} - {torch.float32}:
                return f"it replaces FP32 weights; these are {', '.join(sorted(map(str, dtypes)))}"
        return self.missing()  # last: it may have to compile or import something

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        return {phase: self.speedup(profile.phases[phase], hardware) for phase in self.phases}

    def apply(self, variant: Variant) -> None:
        if reason := self.missing():  # asking also loads what is needed, in a process that only replays a plan
            raise TransformError(reason)
        for twin in variant.edit(self.phase):
            try:
                exchanged = sites.replace(twin, self.exchange, self.skip)
            except ValueError as error:  # weights that the new layer cannot hold
                raise TransformError(f"{self}: {error}") from error
            if not exchanged:
                raise TransformError(f"{self}: no linear layer of {type(twin).__name__} can be exchanged")

    def took_effect(self, variant: Variant) -> str | None:
        for phase in self.phases:
            if not sites.count(variant.modules[phase], self.kind):
                return f"{phase} has no {self.kind.__name__}"
        return None


def _nothing_left(variant: Variant, phase: Phase) -> str:
    for done in variant.transforms:
        if done.stage == Stage.WEIGHTS and phase in done.phases:
            return f"the linear layers of {phase} were already exchanged by {done}"
    return f"{phase} has no linear layers that can be exchanged"
