"""torchao's quantised linear layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..diagnose import ceilings
from ..machine import device as devices
from ..model import linear_layers
from . import require
from .linears import CPU, LinearTransform, weight_bytes

if TYPE_CHECKING:
    from ..diagnose.costs import PhaseProfile
    from ..machine.gpus import Capability
    from ..machine.hardware import Hardware


@dataclass(frozen=True)
class Scheme:
    """One of torchao's schemes and its requirements.

    Args:
        bits: bits per weight, with scales and zero points where groups have them.
        multiplied: dtype of the product's factors ("int8"), or None for the weights' own.
        working: bytes a weight that quantising a layer takes for a moment, with the result.
        capability: the lowest compute capability of a GPU that runs it.
        weights: dtype that weights must have before quantisation, and activations at the input; None: any.
        inputs, outputs: features of a layer on a GPU must be multiples of these; other layers are left unchanged.
        rows: the fewest rows that a product on a GPU takes; fewer are filled up.
    """

    bits: float
    multiplied: str | None
    working: float
    capability: Capability
    weights: torch.dtype | None = None
    inputs: int = 1
    outputs: int = 1
    rows: int = 1


# Working memory is counted in tests/transforms/test_working_memory.py.
# Capabilities: INT8 through cuBLASLt and the tinygemm INT4 kernel need Ampere (8.0). FP8 conversions and products need
# Ada (8.9). Features: cuBLASLt's INT8 needs multiples of 8 (torchao would otherwise multiply on the host without a
# warning), FP8 needs multiples of 16, and INT4 shares a scale and a zero point of 2 bytes each among 32. Rows:
# torch._int_mm takes more than 16; for fewer, torchao multiplies in FP32 without a warning, or does not compile.
SCHEMES = {
    "int8_weight_only": Scheme(8, None, 8, (7, 0)),
    "int8_dynamic": Scheme(8, "int8", 8, (8, 0), inputs=8, outputs=8, rows=17),
    "int4_weight_only": Scheme(5, "bfloat16", 10.2, (8, 0), torch.bfloat16, inputs=32),
    "int4_hqq": Scheme(5, "bfloat16", 24.7, (8, 0), torch.bfloat16, inputs=32),
    "float8_weight_only": Scheme(8, None, 13, (8, 9)),
    "float8_dynamic": Scheme(8, "float8", 13, (8, 9), torch.bfloat16, inputs=16, outputs=16),
}


TILE = 8  # rows of a tile in tinygemm's layout
SLAB = 2**25  # weights that are quantised to INT4 at once; with HQQ, that takes 0.8 GB
ALMOST_ZERO = 2**-13  # replaces a zero; its scale, a 448th of it (FP8's largest number), is still above zero in FP16


class TorchaoLinear(linear_layers.Replacement):
    """A linear layer whose weight torchao quantised.

    Args:
        linear: the layer it replaces; it is only read.
        scheme: a name in `SCHEMES`.
        compiled: compile the product; otherwise torchao dequantises the whole weight at each call.
    """

    def __init__(self, linear: nn.Linear, scheme: str, compiled: bool) -> None:
        dtype = SCHEMES[scheme].weights or linear.weight.dtype
        weight = quantized(without_zero_rows(linear.weight.detach().to(dtype)), scheme)
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        size = sum(part.nbytes for part in parts(weight)) + (0 if bias is None else bias.nbytes)
        super().__init__(linear, size, form=f"{scheme}, compiled" if compiled else scheme)
        self.weight = weight
        self.bias = bias
        on = weight.device.type
        self.rows = SCHEMES[scheme].rows if on == "cuda" else 1
        self.product = _compiled(scheme, tuple(linear.weight.shape), linear.bias is None, on) if compiled else F.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if 0 < rows < self.rows:
            filled = F.pad(x.reshape(rows, -1), (0, 0, 0, self.rows - rows))
            return self(filled)[:rows].view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
        y: torch.Tensor = self.product(x.to(self.weight.dtype), self.weight, self.bias)
        return y.to(x.dtype)


@dataclass(frozen=True)
class Torchao(LinearTransform):
    """Linear weights quantised by torchao.

    Args:
        scheme: "int8_weight_only" or "float8_weight_only" (a scale per row, products in the weights' own dtype),
            "int8_dynamic" or "float8_dynamic" (activations as well, a scale per token), or "int4_weight_only" or
            "int4_hqq" (groups of 32, BF16 activations, only on GPUs). They run the same kernel. The first spreads a
            group's numbers over its range, the second fits the zero by half-quadratic quantisation.
        compile: compile each layer's product; layers of one shape share the code. The INT4 kernel does not need it.
    """

    scheme: str = "int8_weight_only"
    compile: bool = True

    name: ClassVar[str] = "torchao"
    foreign: ClassVar[bool] = True
    summary: ClassVar[str] = "torchao's INT8, INT4 and FP8 linear layers"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def __post_init__(self) -> None:
        require(self.scheme, SCHEMES, "torchao: scheme")

    @property
    def kind(self) -> type[nn.Module]:
        return TorchaoLinear

    @property
    def capability(self) -> Capability:
        return SCHEMES[self.scheme].capability

    @property
    def weight_bits(self) -> float:
        return SCHEMES[self.scheme].bits

    def missing(self, where: torch.device = CPU) -> str | None:
        return _missing(self.scheme, where)

    def exchange(self, linear: nn.Linear) -> nn.Module | None:
        scheme, on_cpu = SCHEMES[self.scheme], linear.weight.device.type == "cpu"
        if not on_cpu and (linear.in_features % scheme.inputs or linear.out_features % scheme.outputs):
            return None
        return TorchaoLinear(linear, self.scheme, self.compile)

    def working_bytes(self, linear: nn.Linear) -> float:
        scheme, weights = SCHEMES[self.scheme], linear.weight.numel()
        at_once = min(weights, SLAB) if self.scheme.startswith("int4") else weights
        joined = scheme.bits / 8 * weights if at_once < weights else 0.0
        converted = 0.0 if scheme.weights in (None, linear.weight.dtype) else 2.0 * weights
        return scheme.working * at_once + joined + converted

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        read, multiplied = weight_bytes(phase, self.weight_bits), SCHEMES[self.scheme].multiplied
        return ceilings.faster_weights(phase, hardware, read, compute_dtype=multiplied)


def quantized(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """Quantise a weight [out, in] into torchao's tensor. The weight is only read.

    A large one becomes INT4 in slabs of rows, which have nothing in common: HQQ takes forty times the result's memory,
    13 GB for a vocabulary of 128 000 and 4096 features.
    """
    rows = max(TILE, SLAB // weight.shape[1] // TILE * TILE)
    if not scheme.startswith("int4") or rows >= weight.shape[0]:
        return _quantized(weight, scheme)
    slabs: list[Any] = [_quantized(slab, scheme) for slab in weight.split(rows)]  # type: ignore[no-untyped-call]
    numbers, factors = torch.cat([s.qdata for s in slabs]), torch.cat([s.scale_and_zero for s in slabs], 1)
    return type(slabs[0])(numbers, factors, slabs[0].block_size, weight.shape)  # type: ignore[no-any-return]


def _quantized(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    from torchao.quantization import quantize_

    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    with devices.of(weight.device).unrecorded():  # torchao's HQQ empties the allocator's cache
        quantize_(holder, _config(scheme))
    if type(holder.weight) is nn.Parameter:  # torchao leaves a layer that it does not take unchanged, without a warning
        raise ValueError(f"torchao leaves a weight of shape {tuple(weight.shape)} as it is with {scheme}")
    return holder.weight.detach()


def without_zero_rows(weight: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] with rows of zeros made almost zero. A padded vocabulary has such rows.

    torchao divides by a row's largest number to scale the row to FP8. For a row of zeros it would divide by zero.
    """
    empty = weight.abs().amax(1) == 0  # [out]
    if not empty.any():
        return weight
    weight = weight.clone()
    weight[empty, 0] = ALMOST_ZERO
    return weight


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor subclass consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def _config(scheme: str) -> Any:
    """The configuration of a scheme. It must not set inductor's flags, because they apply to the whole process."""
    from torchao import quantization as q

    row = q.PerRow()
    if scheme == "int8_weight_only":
        return q.Int8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "int8_dynamic":
        return q.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if scheme == "float8_weight_only":
        return q.Float8WeightOnlyConfig(granularity=row, set_inductor_config=False)
    if scheme == "float8_dynamic":
        return q.Float8DynamicActivationFloat8WeightConfig(granularity=row, set_inductor_config=False)
    chosen = "hqq" if scheme == "int4_hqq" else "tinygemm"
    packing: Any = {"int4_packing_format": "tile_packed_to_4d", "int4_choose_qparams_algorithm": chosen}
    return q.Int4WeightOnlyConfig(group_size=32, set_inductor_config=False, **packing)


@functools.cache
def _missing(scheme: str, where: torch.device) -> str | None:
    """Why torchao cannot run a scheme here, or None.

    A trial on a small layer decides, because the schemes that run on a device change with every release of torchao.
    """
    try:
        dtype = SCHEMES[scheme].weights or (torch.float32 if where.type == "cpu" else torch.bfloat16)
        layer = nn.Linear(64, 64, bias=False, dtype=dtype, device=where)
        TorchaoLinear(layer, scheme, compiled=False)(torch.zeros(1, 64, dtype=dtype, device=where))
    except Exception as error:  # an optional package may raise anything; it cannot be used then
        return f"torchao cannot run {scheme} here: {type(error).__name__}: {error}"
    return None


@functools.cache
def _compiled(scheme: str, shape: tuple[int, ...], biased: bool, on: str) -> Callable[..., torch.Tensor]:
    """A compiled product for all layers of one scheme and shape, with a separate recompilation limit."""
    from ..runtime.steps import compiled as compiled_code

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    compiled_code.require_private_cache()
    options = compiled_code.OPTIONS[on]
    compiled = torch.compile(product, isolate_recompiles=True, options=options)  # type: ignore[call-overload]  # no stub
    return cast("Callable[..., torch.Tensor]", compiled)
