"""What a GPU's operators refuse by dtype, mask, shape and compute capability, and which of them make the host wait.

A CPU takes all of it. The messages are torch's and the libraries' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

Capability = tuple[int, int]
HALF = (torch.float16, torch.bfloat16)
NO_KERNEL = "No available kernel. Aborting execution."


class Refusal(NamedTuple):
    """A rule about operators.

    Args:
        says: what is refused.
        source: the file that says so.
        operators: names of the functions and operators that it is about.
        why: (call, compute capability) -> the error's message, or None.
    """

    says: str
    source: str
    operators: tuple[str, ...]
    why: Callable[[Call, Capability], str | None]


class Call(NamedTuple):
    """An operator's arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def get(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def attention(self) -> Attention:
        """Of SDPA and its kernels, which begin with query, key, value; the mask is fourth, if there is one."""
        names = enumerate(("query", "key", "value"))
        q, k, v = (self.get(place, name) for place, name in names)
        mask = self.get(3, "attn_mask", self.kwargs.get("attn_bias"))
        return Attention(q, k, v, mask if isinstance(mask, torch.Tensor) else None)


class Attention(NamedTuple):
    q: torch.Tensor  # [B, H, Q, D]
    k: torch.Tensor  # [B, Hk, T, D]
    v: torch.Tensor
    mask: torch.Tensor | None


def _no_flash(call: Attention, capability: Capability) -> str | None:
    if capability < (8, 0):
        return "Flash attention only supports gpu architectures in the range [sm80, sm121]."
    if call.mask is not None:
        return "Flash Attention does not support non-null attn_mask."
    if call.q.dtype not in HALF:
        return "FlashAttention only support fp16 and bf16 data type"
    if call.q.shape[-1] > 256:
        return "FlashAttention forward only supports head dimension at most 256"
    if call.q.shape[1] % call.k.shape[1]:
        return "Number of heads in key/value must divide number of heads in query"
    return None


def _no_cudnn(call: Attention, capability: Capability) -> str | None:
    size, most = call.q.shape[-1], 128  # 256 only with cuDNN 9.22 and later
    if capability < (8, 0):
        return "cuDNN MHA only supports gpu architectures in the range [sm80, sm121]."
    if call.q.dtype not in HALF:
        return "Expected query, key and value to all be of dtype: {Half, BFloat16}."
    if size > most:
        return f"head_dim should be no more than {most}"
    if size % 8:
        return "head_dim should be a multiple of 8"
    if call.k.shape[2] == 1:
        return "cudnn SDPA does not support key/value sequence length 1."
    return None


def _no_efficient(call: Attention, capability: Capability) -> str | None:
    alignment = 8 if call.q.dtype in HALF else 4
    if call.q.dtype not in (*HALF, torch.float32):
        return "Expected query, key and value to all be of dtype: {Half, Float, BFloat16}."
    if call.q.dtype == torch.bfloat16 and capability < (8, 0):
        return "Expected query, key and value to all be of dtype: {Half, Float}."
    if call.q.shape[1] != call.k.shape[1]:
        return "Expected query.size(2) == key.size(2) to be true, but got false."
    if call.q.shape[-1] % alignment:
        return "query is not correctly aligned (strideM)"
    return None


def _misaligned(call: Attention) -> str | None:
    """The bias of the memory-efficient kernel: rows begin at multiples of 16 bytes. SDPA pads it by itself."""
    if call.mask is None:
        return None
    alignment = 16 // call.q.element_size()
    if call.mask.dtype != call.q.dtype:
        return "invalid dtype for bias - should match query's dtype"
    for axis, name in enumerate(("strideB", "strideH", "strideM")):
        if call.mask.shape[axis] > 1 and call.mask.stride(axis) % alignment:
            return f"attn_bias is not correctly aligned ({name})."
    return None


def _only(flash: bool = False, efficient: bool = False, cudnn: bool = False) -> bool:
    on = torch.backends.cuda
    found = on.flash_sdp_enabled(), on.mem_efficient_sdp_enabled(), on.cudnn_sdp_enabled(), on.math_sdp_enabled()
    return found == (flash, efficient, cudnn, False)


def _sdpa(call: Call, capability: Capability) -> str | None:
    given = call.attention()
    refused = (
        (_only(flash=True) and _no_flash(given, capability))
        or (_only(efficient=True) and _no_efficient(given, capability))
        or (_only(cudnn=True) and _no_cudnn(given, capability))
    )
    return NO_KERNEL if refused else None


def _flash_operator(call: Call, capability: Capability) -> str | None:
    given = call.attention()._replace(mask=None)
    size = given.q.shape[-1]
    unpadded = "head_size must be a multiple of 8, this is ensured by padding!" if size % 8 else None
    return _no_flash(given, capability) or unpadded


def _varlen(call: Call, capability: Capability) -> str | None:
    q, k, v = (call.get(place, name) for place, name in enumerate(("query", "key", "value")))
    order, begin, seen = call.get(3, "cum_seq_q"), call.get(4, "cum_seq_k"), call.kwargs["seqused_k"]
    count = order.numel() - 1
    taken = {
        "FlashAttention only supports Ampere GPUs or newer.": capability >= (8, 0),
        "FlashAttention only support fp16 and bf16 data type": q.dtype in HALF,
        "query and key must have the same dtype": q.dtype == k.dtype,
        "query and value must have the same dtype": q.dtype == v.dtype,
        "cu_seqlens_q must have dtype int32": order.dtype == torch.int32,
        "cu_seqlens_k must have dtype int32": begin.dtype == torch.int32,
        "seqused_k must have dtype int32": seen.dtype == torch.int32,
        "Input tensor must have contiguous last dimension": all(t.stride(-1) == 1 for t in (q, k, v)),
        "cu_seqlens must be contiguous": order.is_contiguous() and begin.is_contiguous(),
        "seqused_k must be contiguous": seen.is_contiguous(),
        "cu_seqlens_k must have shape (batch_size + 1)": begin.shape == (count + 1,),
        "seqused_k must have shape (batch_size)": seen.shape == (count,),
        "FlashAttention forward only supports head dimension at most 256": q.shape[-1] <= 256,
        "head_size must be a multiple of 8, this is ensured by padding!": q.shape[-1] % 8 == 0,
        "Number of heads in key/value must divide number of heads in query": q.shape[1] % k.shape[1] == 0,
        "k must have shape (total_k, num_heads_k, head_size_og)": k.dim() == 3 and k.shape == v.shape,
    }
    return next((message for message, holds in taken.items() if not holds), None)


def _efficient_operator(call: Call, capability: Capability) -> str | None:
    given = call.attention()
    return _no_efficient(given, capability) or _misaligned(given)


def _cudnn_operator(call: Call, capability: Capability) -> str | None:
    return _no_cudnn(call.attention(), capability)


def _int_mm(call: Call, capability: Capability) -> str | None:
    a, b = call.get(0, "self"), call.get(1, "mat2")
    if a.shape[0] <= 16:
        return f"self.size(0) needs to be greater than 16, but got {a.shape[0]}"
    if a.shape[1] % 8:
        return f"self.size(1) needs to be greater than 0 and a multiple of 8, but got {a.shape[1]}"
    if b.shape[1] % 8:
        return f"mat2.size(1) needs to be greater than 0 and a multiple of 8, but got {b.shape[1]}"
    return None


def _scaled_mm(call: Call, capability: Capability) -> str | None:
    a, b = call.get(0, "input", call.get(0, "self")), call.get(1, "mat2")
    if capability < (8, 9):
        return "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9"
    if a.shape[1] % 16:
        return f"Expected trailing dimension of mat1 to be divisible by 16 but got mat1 shape: ({a.shape})."
    if b.shape[0] % 16 or b.shape[1] % 16:
        return f"mat2 shape ({b.shape}) must be divisible by 16"
    if a.stride(1) != 1:
        return f"self must be row_major, got stride {a.stride()}"
    if b.stride(0) != 1:
        return f"mat2 must be col_major, got stride {b.stride()}"
    if a.dtype == b.dtype == torch.float8_e5m2:
        return "Multiplication of two Float8_e5m2 matrices is not supported"
    return None


def _int4(call: Call, capability: Capability) -> str | None:
    a, b, group = call.get(0, "self"), call.get(1, "mat2"), call.get(2, "qGroupSize")
    k, tiles = a.shape[1], b.shape[3] * 2
    if capability < (8, 0):
        return "_weight_int4pack_mm_cuda is not available for build."
    taken = {
        "A.dtype() == at::kBFloat16": a.dtype == torch.bfloat16,
        "A.is_contiguous()": a.is_contiguous(),
        "B_innerKTiles == 2 || B_innerKTiles == 4 || B_innerKTiles == 8": tiles in (2, 4, 8),
        "B.size(1) == k / (B_innerKTiles * kKTileSize)": b.shape[1] == k // (tiles * 16),
        "qGroupSize == 32 || 64 || 128 || 256": group in (32, 64, 128, 256),
        "isEvenDivisor(kTiles * kKTileSize, qGroupSize)": (k + 15) // 16 * 16 % group == 0,
    }
    wrong = next((condition for condition, holds in taken.items() if not holds), None)
    return wrong and f"Expected {wrong} to be true, but got false."


def _flex(call: Call, capability: Capability) -> str | None:
    size = call.get(0, "query").shape[-1]
    return f"NYI: embedding dimension must be at least 16 but got E={size}" if size < 16 else None


def _bnb_int8(call: Call, capability: Capability) -> str | None:
    dtype = call.get(0, "A").dtype
    return None if dtype == torch.float16 else f"A must be float16, got {dtype}"


SDP = "aten/src/ATen/native/transformers/cuda/sdp_utils.cpp"
BLAS = "aten/src/ATen/native/cuda/Blas.cpp"

REFUSALS: Mapping[str, Refusal] = {
    "sdpa": Refusal(
        "SDPA with one kernel allowed takes what that kernel takes: flash no mask and no FP32, cuDNN no FP32, heads of "
        "at most 128, a multiple of 8, and more than one key, the memory-efficient one aligned heads",
        f"{SDP}, select_sdp_backend, can_use_*_attention",
        ("scaled_dot_product_attention",),
        _sdpa,
    ),
    "flash": Refusal(
        "the flash kernel takes FP16 and BF16, heads of at most 256, padded to a multiple of 8",
        "aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_fwd",
        ("_scaled_dot_product_flash_attention",),
        _flash_operator,
    ),
    "varlen": Refusal(
        "the flash kernel for sequences of different lengths takes FP16 and BF16, heads of at most 256, a multiple of "
        "8, and int32 lengths without gaps between them",
        "aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_varlen_fwd",
        ("_flash_attention_forward",),
        _varlen,
    ),
    "efficient": Refusal(
        "the memory-efficient kernel takes as many key heads as query heads, and masks of the query's dtype whose rows "
        "begin at multiples of 16 bytes",
        "aten/src/ATen/native/transformers/cuda/attention.cu, mem_eff_attention/kernel_forward.h, check_supported",
        ("_scaled_dot_product_efficient_attention",),
        _efficient_operator,
    ),
    "cudnn": Refusal(
        "cuDNN's kernel takes FP16 and BF16, heads of at most 128, a multiple of 8, and more than one key",
        f"{SDP}, check_cudnn_tensor_shapes",
        ("_scaled_dot_product_cudnn_attention",),
        _cudnn_operator,
    ),
    "flex": Refusal(
        "FlexAttention's compiled kernels take heads of at least 16",
        "torch/_inductor/kernel/flex/flex_attention.py",
        ("flex_attention",),
        _flex,
    ),
    "int_mm": Refusal(
        "_int_mm takes more than 16 rows, and multiples of 8 inputs and outputs",
        f"{BLAS}, _int_mm_out_cuda",
        ("_int_mm",),
        _int_mm,
    ),
    "scaled_mm": Refusal(
        "_scaled_mm takes compute capability 8.9, multiples of 16, a row-major and a column-major factor, and not "
        "E5M2 twice",
        f"{BLAS}, _scaled_mm_out_cuda; torch/_meta_registrations.py",
        ("_scaled_mm",),
        _scaled_mm,
    ),
    "int4": Refusal(
        "tinygemm takes BF16, groups of 32 to 256 that divide the inputs, and compute capability 8.0",
        "aten/src/ATen/native/cuda/int4mm.cu, _weight_int4pack_mm_cuda",
        ("_weight_int4pack_mm",),
        _int4,
    ),
    "bnb_int8": Refusal(
        "bitsandbytes quantises FP16 rows to INT8, no others",
        "bitsandbytes/backends/cuda/ops.py, int8_vectorwise_quant",
        ("int8_vectorwise_quant",),
        _bnb_int8,
    ),
}


def refusal(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], capability: Capability
) -> tuple[str, str] | None:
    """(rule, message) of the first rule that refuses a call; None if the GPU takes it."""
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    for rule, row in REFUSALS.items():
        if name in row.operators and (why := row.why(Call(args, kwargs), capability)):
            return rule, why
    return None


def _always(call: Call) -> bool:
    return True


def _by_mask(call: Call) -> bool:
    """A mask is turned into numbers of the elements that it selects; one value for all of them fills by the mask."""
    masks = [t for t in tree_leaves(call.get(1, "indices")) if t is not None and t.dtype in (torch.bool, torch.uint8)]
    values = call.get(2, "values")
    return bool(masks) and not (isinstance(values, torch.Tensor) and values.dim() == 0)


def _unknown_size(call: Call) -> bool:
    return call.kwargs.get("output_size") is None


def _outliers(call: Call) -> bool:
    return bool(call.get(1, "threshold", 0.0))


WAITS: Mapping[str, tuple[Callable[[Call], bool], str]] = {  # operator -> (when it waits, source)
    "aten::_local_scalar_dense": (_always, "ATen/native/cuda/CUDAScalar.cu"),
    "aten::item": (_always, "ATen/native/Scalar.cpp"),
    "aten::is_nonzero": (_always, "ATen/native/TensorProperties.cpp"),
    "aten::equal": (_always, "ATen/native/cuda/Equal.cpp"),
    "aten::allclose": (_always, "ATen/native/TensorCompare.cpp"),
    "aten::nonzero": (_always, "ATen/native/cuda/Nonzero.cu"),
    "aten::masked_select": (_always, "ATen/native/cuda/IndexKernel.cpp"),
    "aten::index": (_by_mask, "ATen/native/IndexingUtils.h, expandTensors; pytorch#78549"),
    "aten::index_put": (_by_mask, "ATen/native/IndexingUtils.h, expandTensors; pytorch#170262"),
    "aten::index_put_": (_by_mask, "ATen/native/IndexingUtils.h, expandTensors; pytorch#170262"),
    "aten::repeat_interleave": (_unknown_size, "ATen/native/Repeat.h, repeat_interleave_common"),
    "aten::_unique2": (_always, "ATen/native/cuda/Unique.cu"),
    "aten::unique_dim": (_always, "ATen/native/cuda/Unique.cu"),
    "aten::unique_consecutive": (_always, "ATen/native/cuda/Unique.cu"),
    "aten::bincount": (_always, "ATen/native/cuda/SummaryOps.cu"),
    "aten::multinomial": (_always, "ATen/native/Distributions.cpp: its checks are read"),
    "aten::_linalg_check_errors": (_always, "ATen/native/BatchLinearAlgebra.cpp"),
    "bitsandbytes::int8_vectorwise_quant": (_outliers, "bitsandbytes/backends/cuda/ops.py: argwhere"),
}


def waits(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator makes the host wait for the device."""
    when, _ = WAITS.get(func._schema.name, (None, ""))
    return when is not None and when(Call(args, kwargs))


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors among a call's arguments."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
