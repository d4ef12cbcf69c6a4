"""Linear layers over the kernels, for inference. They hold buffers in packed layout; `forward` calls one operator."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from autotune.model.linear_layers import share
from autotune.runtime.kernels import compensated, pack


@functools.cache
def _least_digits(stored: torch.dtype) -> int:
    """The fewest digits of inputs for products in integers over numbers that are stored so; 0: there are none here."""
    return int(torch.ops.autotune.least_digits(pack.BITS[stored]))


class PackedLinear(nn.Module, ABC):
    """y = x W^T + b with narrow weights, summed in FP32. The operators must be loaded (`kernels.available`).

    Inputs in another dtype are widened, and results are returned in that dtype.

    Make a layer by `from_linear`, or by `from_weight` from a weight [out_features, in_features]. transformers' `Conv1D`
    stores the transpose, so pass `conv.weight.T`.
    """

    bias: Tensor | None
    tensors: ClassVar[tuple[str, ...]]  # names of the packed weight's parts

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        pack.check(weight)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in any floating dtype -> [..., out_features] in the same dtype."""
        if x.dtype is torch.float32:  # avoids casts, which cost a dispatch even if they change nothing
            return self.product(x)
        return self.product(x.float()).to(x.dtype)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], both FP32."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The FP32 weight [out_features, in_features] that `forward` computes with."""

    @classmethod
    def of(cls, linear: nn.Linear, packed: Mapping[str, Tensor]) -> Self:
        """The layer that `from_linear` made of `linear`, from its `packed` parts.

        Raises:
            ValueError: these are not the parts of such a layer.
        """
        layer = cls(linear.weight, linear.bias)
        if set(packed) != set(cls.tensors):
            raise ValueError(f"{cls.__name__} consists of {', '.join(cls.tensors)}, not of {', '.join(packed)}")
        for name in cls.tensors:
            layer.register_buffer(name, packed[name])
        return layer

    @property
    def arithmetic(self) -> str:
        """What products are computed in; see `Hardware.peak_flops_per_s`."""
        return "float32"

    @property
    def packed(self) -> dict[str, Tensor]:
        """The parts of the packed weight by name, for `of`."""
        return {name: getattr(self, name) for name in self.tensors}

    @property
    def stored(self) -> list[Tensor]:
        """The weight as stored: its numbers, then what restores it."""
        held = self._buffers  # an attribute of a module takes ten times as long
        return [held[name] for name in self.tensors]  # type: ignore[misc]

    @property
    def weight_bytes(self) -> int:
        """Bytes read for each token at batch 1."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class HalfLinear(PackedLinear):
    """Weights stored in FP16 (or BF16, or FP32), with FP32 arithmetic."""

    tensors = ("weight",)
    weight: Tensor  # [ceil(N / 16), K padded, 16]

    @classmethod
    def from_linear(cls, linear: nn.Linear, dtype: torch.dtype = torch.float16) -> Self:
        """Pack an `nn.Linear`; see `from_weight`."""
        return cls.from_weight(linear.weight, linear.bias, dtype)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float16) -> Self:
        """Pack a weight [out_features, in_features].

        Raises:
            ValueError: a weight is not finite in `dtype`.
        """
        layer = cls(weight, bias)
        layer.register_buffer("weight", pack.pack_half(weight, dtype))
        return layer

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.autotune.linear_f16(x, self.weight, self.bias, self.out_features)
        return y

    def dequantize(self) -> Tensor:
        return pack.deinterleave(self.weight.float(), self.out_features, self.in_features)


class GroupedLinear(PackedLinear):
    """Quantised weights with a scale per group of inputs.

    Where the processor has AVX2 or VNNI, products are in integers, with inputs rounded in groups of 32.

    Attributes:
        digits: of the inputs, in base 256: 2 for inputs of 16 bits, as exact as FP32 to about 2e-5, 1 for inputs of
            8 bits (with VNNI, and for INT4 weights with AVX2), 0 for FP32 arithmetic everywhere.
    """

    digits = 2
    operator: ClassVar[str]
    weight: Tensor
    scales: Tensor  # [ceil(N / 16), groups, 16]

    @property
    def arithmetic(self) -> str:
        return {0: "float32", 1: "int8", 2: "int16"}[self.digits if self.in_integers else 0]

    @property
    def in_integers(self) -> bool:
        """Whether products are in integers here."""
        return self.digits > 0 and _least_digits(self.weight.dtype) > 0

    @property
    def bits(self) -> int:
        """Of a weight: 8, 6 or 4."""
        return pack.BITS[self.weight.dtype]

    @property
    def group(self) -> int:
        """Inputs that share a scale; all of them, after padding, if there is one for a row."""
        return pack.padded_inputs(self.weight) // self.scales.shape[1]

    def rounds_like(self, other: GroupedLinear) -> bool:
        """Whether both round the same input alike, so that it can be rounded once for both."""
        if self.digits != other.digits:
            return False
        held, others = self._buffers, other._buffers
        if held["weight"].dtype == others["weight"].dtype:  # type: ignore[union-attr]
            names = ("weight", "scales")
            return all(held[name].shape[1] == others[name].shape[1] for name in names)  # type: ignore[union-attr]
        return self.group == other.group

    def product(self, x: Tensor) -> Tensor:
        operator = getattr(torch.ops.autotune, self.operator)
        y: Tensor = operator(x, *self.stored, self.bias, self.out_features, self.digits)
        return y


class QuantisedLinear(GroupedLinear):
    """Weights that are quantised here, from those of a layer."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, group: int = pack.GROUP) -> Self:
        """Pack an `nn.Linear`; see `from_weight`."""
        return cls.from_weight(linear.weight, linear.bias, group)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, group: int = pack.GROUP) -> Self:
        """Quantise and pack a weight [out_features, in_features]; group 0 is one scale per output row.

        Raises:
            ValueError: the weight is not finite, or the group is not a multiple of 8.
        """
        layer = cls(weight, bias)
        for name, buffer in zip(cls.tensors, cls.quantize(weight, group), strict=True):
            layer.register_buffer(name, buffer)
        return layer

    @staticmethod
    @abstractmethod
    def quantize(weight: Tensor, group: int) -> tuple[Tensor, ...]:
        """The packed weight [out_features, in_features] and what restores it."""


class Int8Linear(QuantisedLinear):
    """Symmetric INT8 weights with a scale per group of inputs."""

    operator = "linear_i8"
    tensors = ("weight", "scales")
    weight: Tensor  # [ceil(N / 16), K padded, 16]

    quantize = staticmethod(pack.quantize_i8)

    def dequantize(self) -> Tensor:
        return pack.dequantize_i8(self.weight, self.scales, self.out_features, self.in_features)


class Int6Linear(QuantisedLinear):
    """Symmetric INT6 weights with a scale per group of inputs."""

    operator = "linear_i6"
    tensors = ("weight", "scales")
    weight: Tensor  # [ceil(N / 16), 3 K padded / 8, 16]

    quantize = staticmethod(pack.quantize_i6)

    def dequantize(self) -> Tensor:
        return pack.dequantize_i6(self.weight, self.scales, self.out_features, self.in_features)


class Int4Linear(QuantisedLinear):
    """Asymmetric INT4 weights with a scale and a zero per group of inputs."""

    operator = "linear_i4"
    tensors = ("weight", "scales", "zeros")
    weight: Tensor  # [ceil(N / 16), K padded / 8, 16]
    zeros: Tensor  # [ceil(N / 16), groups, 16]

    quantize = staticmethod(pack.quantize_i4)

    @classmethod
    def for_inputs(cls, linear: nn.Linear, moments: Tensor, group: int = pack.GROUP) -> Self:
        """Pack an `nn.Linear` so that its outputs for such inputs change little; see `compensated.quantize_i4`.

        Raises:
            ValueError: the weight or the moments are not finite.
        """
        words, scales, zeros = compensated.quantize_i4(linear.weight, moments, group)
        return cls.of(linear, {"weight": words, "scales": scales, "zeros": zeros})

    def dequantize(self) -> Tensor:
        return pack.dequantize_i4(self.weight, self.scales, self.zeros, self.out_features, self.in_features)


class RoundedLinear(GroupedLinear):
    """A packed layer with inputs of 8 bits: its products take half the time.

    Args:
        layer: an `Int8Linear`, `Int6Linear` or `Int4Linear`; its tensors are shared.
    """

    digits = 1

    def __init__(self, layer: GroupedLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.operator, self.tensors = layer.operator, layer.tensors  # type: ignore[misc]
        share(layer, self, (*layer.tensors, "bias"))
        self.precise = (layer,)  # in a tuple, so that the layer does not become a submodule

    def dequantize(self) -> Tensor:
        return self.precise[0].dequantize()
