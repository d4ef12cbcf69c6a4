"""Projections of the same input merged into one matmul: queries, keys and values; gate and up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from ..diagnose import ceilings
from ..errors import TransformError
from ..model import linear_layers
from ..runtime.merged_blocks import MergedAttention, MergedMlp, stand_in
from ..runtime.variant import Stage, Transform

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

KINDS = (MergedAttention, MergedMlp)
READ = "q_proj,k_proj,v_proj,gate_proj,up_proj"  # names of the layers that are merged


@dataclass(frozen=True)
class MergedLinears(Transform):
    """Exchange attention and gated feed-forward blocks for ones with fewer, larger matmuls.

    A merged layer holds a copy of the weights. Merging comes before the transforms of weights: they pack the merged
    layers, and leave no plain layers to merge.
    """

    name: ClassVar[str] = "merged_linears"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "one matmul for queries, keys and values, and one for gate and up"
    lossless: ClassVar[bool] = True

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if (reason := linear_layers.obstacle(variant.original)) is not None:
            return reason
        for phase in self.phases:
            model = variant.modules[phase]
            if count(model):
                return f"the projections of {phase} are merged already"
            with torch.no_grad():
                if next(stand_ins(model), None) is None:
                    return (
                        f"{type(model).__name__} has no plain projections of one input in a block of a known form: "
                        "they are one already, or exchanged"
                    )
        return None

    def rehearsed(self) -> Transform:
        return self

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: no time passes between operators, and the larger matmuls take their least possible time."""
        return {
            phase: ceilings.less_overhead(profile.phases[phase], hardware, new_kernels=True) for phase in self.phases
        }

    def extra_bytes(self, variant: Variant) -> float:
        """Bytes of the merged copies; the original keeps its projections."""
        models = {id(variant.modules[phase]): variant.modules[phase] for phase in self.phases}.values()
        layers = [
            layer
            for model in models
            for name, layer in linear_layers.linears(model).items()
            if linear_layers.is_named(name, READ)
        ]
        return float(sum(layer.weight.nbytes for layer in layers))

    def apply(self, variant: Variant) -> None:
        for twin in variant.edit(self.phase):
            merged = 0
            with torch.no_grad():
                for name, new in stand_ins(twin):
                    twin.set_submodule(name, new.eval())
                    merged += 1
            if not merged:
                raise TransformError(f"{self}: {type(twin).__name__} has no projections that can be merged")

    def took_effect(self, variant: Variant) -> str | None:
        for phase in self.phases:
            if not count(variant.modules[phase]):
                return f"{phase} has no merged projections"
        return None


def count(model: nn.Module) -> int:
    """The number of merged blocks of a model."""
    return sum(isinstance(module, KINDS) for module in model.modules())


def stand_ins(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each block's name and merged form, one at a time, so that at most one copy exists outside the model."""
    for name, module in list(model.named_modules()):
        if name and (new := stand_in(module)) is not None:
            yield name, new
