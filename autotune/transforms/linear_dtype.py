"""Matmuls over weights computed in a narrower dtype. Everything between them, including the KV cache, is unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..diagnose import ceilings
from ..model import linear_layers
from . import require
from .linears import LinearTransform, nothing_left, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..diagnose.costs import PhaseProfile, Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase


class CastLinear(linear_layers.Replacement):
    """y = x W^T + b in `dtype`, returned in the dtype of x.

    Args:
        linear: the layer it replaces.
        dtype: dtype of the weights and the arithmetic.
        packed: reorder the weights for oneDNN once, instead of at each call. Compilers do not take such a tensor.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, packed: bool) -> None:
        form = f"{dtype}, packed" if packed else str(dtype)
        super().__init__(linear, linear.weight.numel() * dtype.itemsize, form)
        self.dtype = dtype
        self.packed = packed
        weight = linear.weight.detach().to(dtype).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if packed else weight
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = x.to(self.dtype)
        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(narrow, self.weight, self.bias, "none", [], "")
        else:
            y = F.linear(narrow, self.weight, self.bias)
        return y.to(x.dtype)

    def plain(self) -> nn.Linear | None:
        if self.packed:
            return None
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias, requires_grad=False)
        return linear


@dataclass(frozen=True)
class LinearDtype(LinearTransform):
    """Compute linear layers in BF16 or FP16. Input and output are cast at each layer.

    It pays only where the hardware multiplies that dtype (AMX, AVX512-BF16, tensor cores).

    Args:
        dtype: "bfloat16" or "float16".
    """

    dtype: str = "bfloat16"

    name: ClassVar[str] = "linear_dtype"
    summary: ClassVar[str] = "BF16 or FP16 matmuls over weights; activations between them and KV cache unchanged"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def __post_init__(self) -> None:
        require(self.dtype, ("bfloat16", "float16"), "linear_dtype: dtype")

    @property
    def kind(self) -> type[nn.Module]:
        return CastLinear

    def refusal(self, dtype: torch.dtype) -> str | None:
        if dtype == getattr(torch, self.dtype):
            return f"the weights are in {dtype} already"
        return super().refusal(dtype)

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        for phase in self.phases:  # other transforms may narrow these layers further; a second linear_dtype may not
            if linear_layers.count(variant.modules[phase], CastLinear):
                return nothing_left(variant, phase)
            layers = linear_layers.linears(variant.modules[phase], self.skip).values()
            if (
                hardware.device == "cuda"
                and layers
                and all(layer.weight.dtype in (torch.bfloat16, torch.float16) for layer in layers)
            ):
                return "tensor cores multiply BF16 and FP16 at one rate, and the weights are in one of them already"
        return super().unavailable(variant, hardware)

    def exchange(self, linear: nn.Linear) -> nn.Module:
        dtype = getattr(torch, self.dtype)
        if not torch.isfinite(linear.weight.abs().amax().to(dtype)):
            raise ValueError(f"a weight of {linear.weight.abs().amax():.3g} does not fit {self.dtype}")
        # only prefill is packed: decode may be compiled later, and compilers do not take packed tensors
        packed = self.phase == "prefill" and linear.weight.device.type == "cpu" and _packs(self.dtype)
        return CastLinear(linear, dtype, packed)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        return ceilings.faster_weights(phase, hardware, weight_bytes(phase, 16), compute_dtype=self.dtype)

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """As for other weights; the kernels that multiply a single row are torch's own."""
        found = dict(super().predict(profile, hardware))
        if "decode" in found and profile.batch == 1:
            phase = profile.phases["decode"]
            found["decode"] = ceilings.faster_rows(phase, hardware, weight_bytes(phase, 16), self.dtype)
        return found


def _packs(dtype: str) -> bool:
    """Whether oneDNN multiplies packed weights of this dtype on this processor."""
    onednn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(onednn._is_mkldnn_bf16_supported() if dtype == "bfloat16" else onednn._is_mkldnn_fp16_supported())
