"""Linear layers that multiply many tokens in BF16 over weights as stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune.model.linear_layers import share
from autotune.runtime.kernels.modules import PackedLinear

# Tokens; fewer are multiplied by the layer that was given, which is more exact and faster for so few: in integers by
# 1.2 at 32 tokens and by 2 at 8, in FP32 over FP16 weights as fast at 32 and by 2 at 8 (AVX512-BF16). A prompt's last
# part has to be multiplied like the whole: `batching.joined` gives it as many.
FEW = 32
# BF16 numbers that an FP32 number is split into -> what products are computed in; see `Hardware.peak_flops_per_s`.
ARITHMETIC = {1: "bfloat16", 2: "bfloat16x3"}


class Bf16Linear(nn.Module):
    """y = x W^T + b with BF16 products and FP32 sums. Weights are converted as they are read and never kept in BF16.

    The operators must be loaded (`kernels.available`), and the processor must multiply BF16 (`kernels.no_bf16_unit`).

    Args:
        layer: an FP32 `nn.Linear`, or a packed layer; its tensors are shared.
        parts: BF16 numbers that an FP32 number is split into: 1, or 2 for three products and an error of about 2^-16.

    Raises:
        ValueError: the weight of an `nn.Linear` is not FP32, or `parts` is neither 1 nor 2.
    """

    weight: Tensor  # [N, K] in FP32, or packed in blocks of 16 rows
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | PackedLinear, parts: int = 1) -> None:
        super().__init__()
        if parts not in ARITHMETIC:
            raise ValueError(f"parts must be 1 or 2, not {parts}")
        if isinstance(layer, nn.Linear) and layer.weight.dtype != torch.float32:
            raise ValueError(f"expected a weight in FP32, got {layer.weight.dtype}")
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.parts = parts
        share(layer, self, ("weight", "scales", "zeros", "bias"))
        # in a tuple, so that the layer does not become a submodule
        self.packed = (layer,) if isinstance(layer, PackedLinear) else ()

    @property
    def arithmetic(self) -> str:
        """What products are computed in."""
        return ARITHMETIC[self.parts]

    @property
    def weight_bytes(self) -> int:
        """Bytes read at each call. They are shared with the layer that this one was made from."""
        held = (self.weight, self.scales, self.zeros, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    @property
    def stored(self) -> list[Tensor]:
        """The weight as stored: its numbers, then scales and zeros if it has them."""
        return [tensor for tensor in (self.weight, self.scales, self.zeros) if tensor is not None]

    def serving(self, tokens: int) -> Bf16Linear | PackedLinear:
        """The layer that multiplies this many tokens: this one, or the packed one that it was made from."""
        return self.packed[0] if self.packed and tokens < FEW else self

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() < FEW * self.in_features:
            return self.packed[0](x) if self.packed else F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.autotune.linear_bf16(
            x, self.weight, self.scales, self.zeros, self.bias, self.out_features, self.parts
        )
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, parts={self.parts}"
