"""Torch's own dynamic quantisation: INT8 weights per channel, activations quantised per tensor at each call."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..diagnose import ceilings
from ..model import linear_layers
from .linears import CPU, LinearTransform, weight_bytes

if TYPE_CHECKING:
    from torch import nn

    from ..diagnose.costs import PhaseProfile
    from ..machine.hardware import Hardware


class DynamicInt8Linear(linear_layers.Replacement):
    """`torch.ops.quantized.linear_dynamic` over a weight packed for the engine of this processor."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, linear.weight.numel() + 4 * linear.out_features, form="INT8")
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127  # [out]
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        with warnings.catch_warnings():  # torch warns that it will remove quantised tensors in a later release
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
            numbers = torch.quantize_per_channel(weight.contiguous(), scales.double(), zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(numbers, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # activations have seven bits: with eight, the 16-bit sums of processors without VNNI overflow
        y: torch.Tensor = torch.ops.quantized.linear_dynamic(x.float(), self.packed, reduce_range=True)
        return y.to(x.dtype)


@dataclass(frozen=True)
class DynamicInt8(LinearTransform):
    """INT8 weights and activations on torch's own kernels: fast, but inaccurate where activations have outliers."""

    name: ClassVar[str] = "dynamic_int8"
    summary: ClassVar[str] = "torch's dynamic quantisation: INT8 weights, INT8 activations per tensor"
    recordable: ClassVar[bool] = False  # its weights are an object of torch's, not a tensor

    @property
    def kind(self) -> type[nn.Module]:
        return DynamicInt8Linear

    def missing(self, where: torch.device = CPU) -> str | None:
        engines = set(torch.backends.quantized.supported_engines) - {"none"}
        return None if engines else "this build of torch has no quantisation engine"

    def exchange(self, linear: nn.Linear) -> nn.Module:
        return DynamicInt8Linear(linear)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        return ceilings.faster_weights(phase, hardware, weight_bytes(phase, 8), compute_dtype="int8")
