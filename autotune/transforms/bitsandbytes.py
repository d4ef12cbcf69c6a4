"""8-bit and 4-bit linear layers that call bitsandbytes' operators directly.

The modules of bitsandbytes are not used: they warn at each call, and they repack their weights during a call.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from ..diagnose import ceilings
from ..model import linear_layers
from . import require
from .linears import CPU, LinearTransform, weight_bytes

if TYPE_CHECKING:
    from torch import nn

    from ..diagnose.costs import PhaseProfile
    from ..machine.gpus import Capability
    from ..machine.hardware import Hardware

INT8_TENSOR_CORES = (7, 5)  # lowest compute capability with INT8 tensor cores (Turing)
OUTLIER = 6.0  # absolute value of an input above which LLM.int8 multiplies its column in floating point
BLOCK = 64  # 4-bit weights that share a scale
# scheme -> bits of a weight, with the FP32 scales of blocks
BITS = {"int8": 8.0, "int8_vectorwise": 8.0, "nf4": 4 + 32 / BLOCK, "fp4": 4 + 32 / BLOCK}
PACKED_ROWS = 32  # the packed 4-bit layout needs a multiple of this many output rows


class OutlierInt8Linear(linear_layers.Replacement):
    """LLM.int8: INT8 weights per row, INT8 activations per token, outlier columns in floating point.

    At each call, the device finds the outlier columns and the host waits for the result. On a GPU, the wait alone makes
    this slower than FP16 at batch 1, and the layer cannot be captured in a graph.

    Source: Dettmers et al., "LLM.int8(): 8-bit matrix multiplication for transformers at scale", 2022.

    Args:
        linear: the layer it replaces; it is only read.
        threshold: absolute value above which an input is an outlier; 0: there are no outliers, and the host never
            waits.
    """

    def __init__(self, linear: nn.Linear, threshold: float = OUTLIER) -> None:
        form = "LLM.int8" if threshold else "INT8"
        super().__init__(linear, linear.weight.numel() + 4 * linear.out_features, form)
        self.threshold = threshold
        self.capturable = not threshold
        self.functional = library().functional
        half = linear.weight.detach().to(torch.float16, copy=True).contiguous()
        self.weight, self.scales, _ = self.functional.int8_vectorwise_quant(half)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)  # [B * S, K]
        # a copy, because the operator overwrites the outliers in its input with zeros
        numbers, scales, columns = self.functional.int8_vectorwise_quant(
            rows.to(torch.float16, copy=True), threshold=self.threshold
        )
        if self.threshold:
            y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
                rows, numbers, self.weight, scales, self.scales, columns, self.bias
            )
        else:
            y = torch.ops.bitsandbytes.int8_scaled_mm(numbers, self.weight, scales, self.scales, self.bias, rows.dtype)
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return cast("torch.Tensor", y)


class FourBitLinear(linear_layers.Replacement):
    """NF4 or FP4 weights in blocks, packed for the processor's BF16 instructions if it has them.

    For an FP32 model, a GPU multiplies in BF16: FP32 products would not use its tensor cores.
    """

    def __init__(self, linear: nn.Linear, scheme: str) -> None:
        super().__init__(linear, linear.weight.numel() // 2 + linear.weight.numel() * 4 // BLOCK, form=scheme)
        bnb, weight = library(), linear.weight.detach().contiguous()
        self.weight, self.state = bnb.functional.quantize_4bit(weight, blocksize=BLOCK, quant_type=scheme)
        fits = linear.out_features % PACKED_ROWS == 0 and linear.in_features % BLOCK == 0
        pack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
        if pack is not None and fits and weight.device.type == "cpu" and bnb.functional.has_avx512bf16():
            self.weight, self.state = pack(self.weight, self.state)
        else:
            self.weight = self.weight.t()  # up to 0.49, bitsandbytes takes the weight's orientation from this shape
        self.dtype = torch.bfloat16 if weight.is_cuda and weight.dtype == torch.float32 else weight.dtype
        self.bias = None if linear.bias is None else linear.bias.detach().to(self.dtype)
        self.multiply = bnb.matmul_4bit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.multiply(x.to(self.dtype), self.weight, quant_state=self.state, bias=self.bias)
        return y.to(x.dtype)


@dataclass(frozen=True)
class Bitsandbytes(LinearTransform):
    """Linear weights quantised by bitsandbytes.

    Args:
        scheme: "int8" (LLM.int8), "int8_vectorwise" (without outlier columns: faster, less accurate, and graphs can
            capture it), "nf4" or "fp4".
    """

    scheme: str = "nf4"

    name: ClassVar[str] = "bitsandbytes"
    foreign: ClassVar[bool] = True
    summary: ClassVar[str] = "bitsandbytes' LLM.int8, NF4 and FP4 linear layers"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def __post_init__(self) -> None:
        require(self.scheme, BITS, "bitsandbytes: scheme")

    @property
    def kind(self) -> type[nn.Module]:
        return OutlierInt8Linear if BITS[self.scheme] == 8 else FourBitLinear

    @property
    def capability(self) -> Capability | None:
        return INT8_TENSOR_CORES if BITS[self.scheme] == 8 else None

    def missing(self, where: torch.device = CPU) -> str | None:
        return _missing(self.scheme, where)

    def exchange(self, linear: nn.Linear) -> nn.Module:
        return _layer(linear, self.scheme)

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        bits = BITS[self.scheme]
        read = weight_bytes(phase, bits)
        return ceilings.faster_weights(phase, hardware, read, compute_dtype="int8" if bits == 8 else None)


def library() -> Any:
    """Import bitsandbytes without its log message that an optional kernel could be downloaded."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        log.setLevel(level)
    return bitsandbytes


def _layer(linear: nn.Linear, scheme: str) -> nn.Module:
    if BITS[scheme] == 4:
        return FourBitLinear(linear, scheme)
    return OutlierInt8Linear(linear, OUTLIER if scheme == "int8" else 0.0)


@functools.cache
def _missing(scheme: str, where: torch.device) -> str | None:
    """Why bitsandbytes cannot run a scheme here, or None.

    A trial on a small layer decides: the package may be missing, or lack its native library for this machine.
    """
    online = os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE")
    if "bitsandbytes" not in sys.modules and importlib.util.find_spec("kernels") is not None and online:
        return "importing bitsandbytes beside the package kernels may download code: set HF_HUB_OFFLINE=1 to allow it"
    try:
        layer = _layer(torch.nn.Linear(64, 128, bias=False, dtype=torch.float32, device=where), scheme)
        layer(torch.ones(1, 64, dtype=torch.float32, device=where))
    except Exception as error:  # an optional package may raise anything; it cannot be used then
        return f"bitsandbytes cannot run {scheme} here: {type(error).__name__}: {error}"
    return None
