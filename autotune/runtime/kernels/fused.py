"""Decoder layers with one fused operator. In prefill, each small operator would pass over megabytes of activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autotune.runtime.kernels.bf16 import FEW, Bf16Linear

ACTIVATIONS = ("silu", "gelu_tanh")  # in the order of the operators' numbers for them


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in FP32.

    Args:
        weight: [N]; shared if it is a parameter.
        eps: added to the mean.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        if isinstance(weight, nn.Parameter):
            self.register_parameter("weight", weight)
        else:
            self.register_buffer("weight", weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.autotune.rms_norm(x, self.weight, self.eps)
        return y

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)), in one operator if the three layers are `Bf16Linear`.

    Args:
        gate_proj, up_proj, down_proj: linear layers of any kind.
        activation: a name in `ACTIVATIONS`.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: str) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = ACTIVATIONS.index(activation)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if isinstance(gate, Bf16Linear) and isinstance(up, Bf16Linear) and isinstance(down, Bf16Linear):
            enough = x.numel() >= FEW[gate.parts] * gate.in_features
            if enough and gate.parts == up.parts == down.parts:
                return self._multiply(x, gate, up, down)
        y: Tensor = down(torch.ops.autotune.gate_up(gate(x), up(x), self.activation))
        return y

    def _multiply(self, x: Tensor, gate: Bf16Linear, up: Bf16Linear, down: Bf16Linear) -> Tensor:
        y: Tensor = torch.ops.autotune.linear_mlp(
            x,
            *(layer.stored for layer in (gate, up, down)),
            *(layer.bias for layer in (gate, up, down)),
            gate.out_features,
            down.out_features,
            self.activation,
            gate.parts,
        )
        return y

    def extra_repr(self) -> str:
        return f"activation={ACTIVATIONS[self.activation]}"
