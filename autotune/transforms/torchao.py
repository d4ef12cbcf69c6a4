"""torchao's quantised linear layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from .. import roofline, sites
from . import require
from .linears import LinearTransform

if TYPE_CHECKING:
    from ..hardware import Hardware
    from ..profile import PhaseProfile

SCHEMES = {  # scheme -> (bits of a weight, dtype that is multiplied or None for the model's)
    "int8_weight_only": (8, None),
    "int8_dynamic": (8, "int8"),
    "int4_weight_only": (4, "bfloat16"),
}


class TorchaoLinear(sites.Replacement):
    """A linear layer whose weight torchao quantised.

    Args:
        linear: the layer it stands in for; only read.
        scheme: a name in `SCHEMES`.
        compiled: compile the product; without it torchao dequantises the whole weight at each call.
    """

    def __init__(self, linear: nn.Linear, scheme: str, compiled: bool) -> None:
        size = linear.weight.numel() * SCHEMES[scheme][0] // 8 + 4 * linear.out_features
        super().__init__(linear, size, form=f"{scheme}, compiled" if compiled else scheme)
        dtype = torch.bfloat16 if scheme == "int4_weight_only" else linear.weight.dtype
        self.weight = quantized(linear.weight.detach().to(dtype), scheme)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.product = _compiled(scheme, tuple(linear.weight.shape), linear.bias is None) if compiled else F.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.product(x.to(self.weight.dtype), self.weight, self.bias)
        return y.to(x.dtype)


@dataclass(frozen=True)
class Torchao(LinearTransform):
    """Linear weights quantised by torchao.

    Args:
        scheme: "int8_weight_only" and "int8_dynamic" (a scale per row), or "int4_weight_only" (groups of 32).
        compile: compile each layer's product; layers of one shape share the code.
    """

    scheme: str = "int8_weight_only"
    compile: bool = True

    name: ClassVar[str] = "torchao"
    summary: ClassVar[str] = "torchao's INT8 and INT4 linear layers"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def __post_init__(self) -> None:
        require(self.scheme, SCHEMES, "torchao: scheme")

    @property
    def kind(self) -> type[nn.Module]:
        return TorchaoLinear

    def missing(self) -> str | None:
        return _missing(self.scheme)

    def exchange(self, linear: nn.Linear) -> nn.Module | None:
        if self.scheme == "int4_weight_only" and linear.in_features % 32:
            return None
        return TorchaoLinear(linear, self.scheme, self.compile)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        bits, dtype = SCHEMES[self.scheme]
        return roofline.faster_weights(phase, hardware, phase.weight_bytes * bits / 32, compute_dtype=dtype)


def quantized(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """torchao's tensor for a weight [out, in], which is only read."""
    from torchao.quantization import quantize_  # type: ignore[import-untyped]

    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(holder, _config(scheme))
    return holder.weight.detach()


def _config(scheme: str) -> Any:
    """The configuration of a scheme; it must not set inductor's flags, which are the whole process's."""
    from torchao import quantization as q  # type: ignore[import-untyped]

    if scheme == "int8_weight_only":
        return q.Int8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "int8_dynamic":
        return q.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return q.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)


@functools.cache
def _missing(scheme: str) -> str | None:
    """Found out by trying on a small layer: which schemes run where changes with every release of torchao."""
    try:
        layer = nn.Linear(64, 64, bias=False, dtype=torch.float32)
        TorchaoLinear(layer, scheme, compiled=False)(torch.zeros(1, 64))
    except Exception as error:  # whatever an optional package raises, it cannot be used
        return f"torchao cannot run {scheme} here: {type(error).__name__}: {error}"
    return None


@functools.cache
def _compiled(scheme: str, shape: tuple[int, ...], biased: bool) -> Callable[..., torch.Tensor]:
    """A compiled product for all layers of one kind, with a recompilation limit of its own."""

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    compiled = torch.compile(product, isolate_recompiles=True)  # type: ignore[call-overload]  # missing in the stub
    return cast("Callable[..., torch.Tensor]", compiled)
