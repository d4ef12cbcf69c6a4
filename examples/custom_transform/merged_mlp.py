"""A transform: the gate and up projections of every gated MLP as one matmul.

Both read the same input. One matmul over the stacked weights does the work of two, with one operator less per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from autotune.errors import TransformError
from autotune.transforms import Stage, Transform


@dataclass(frozen=True)
class MergedMLP(Transform):
    """Merges gate and up projections that are plain linear layers without bias."""

    name: ClassVar[str] = "merged_mlp"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "gate and up projection of each MLP in one matmul"
    lossless: ClassVar[bool] = True  # judged at the lossless tier, whatever the policy's tier is

    def unavailable(self, variant: Any, hardware: Any) -> str | None:
        if not all(mergeable(variant.modules[phase]) for phase in self.phases):
            return "the model has no MLP with plain gate_proj and up_proj"
        return None

    def predict(self, profile: Any, hardware: Any) -> Mapping[Any, float]:
        """At best a tenth: one of a layer's ten or so operators less. Too high costs a trial, too low the gain."""
        return dict.fromkeys(self.phases, 1.1)

    def apply(self, variant: Any) -> None:
        for twin in variant.edit(self.phase):  # twins share every tensor with the original, which is never edited
            names = mergeable(twin)
            if not names:
                raise TransformError("no MLP to merge")
            for name in names:
                twin.set_submodule(name, Merged(twin.get_submodule(name)))

    def took_effect(self, variant: Any) -> str | None:
        for phase in self.phases:
            if not any(isinstance(module, Merged) for module in variant.modules[phase].modules()):
                return f"no MLP of {phase} is merged"
        return None


class Merged(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        weights = [mlp.gate_proj.weight, mlp.up_proj.weight]  # each [I, H]
        self.gate_up = nn.Parameter(torch.cat(weights), requires_grad=False)  # [2 I, H], a tensor of its own
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(hidden, self.gate_up).chunk(2, dim=-1)
        out: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return out


def mergeable(model: nn.Module) -> list[str]:
    """Names of the MLPs that `Merged` can stand in for."""
    return [
        name
        for name, module in model.named_modules()
        if {child for child, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and all(type(p) is nn.Linear and p.bias is None for p in (module.gate_proj, module.up_proj))
    ]
