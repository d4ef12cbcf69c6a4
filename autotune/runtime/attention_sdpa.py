"""Attention functions that each call one kernel of torch's scaled dot-product attention.

`torch.nn.attention.sdpa_kernel` sets switches for the whole process, including other threads' requests. This module
calls the kernel's operator directly: it runs or it raises, and never falls back silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import seam

aten = torch.ops.aten

FLASH_MULTIPLE = 8  # head sizes are padded to a multiple of this, as SDPA does


@dataclass(frozen=True)
class SdpaKernel:
    """One of SDPA's kernels.

    Args:
        name: name in transformers' registry. It must not contain "flash": transformers would make flash-attn's masks.
        operator: name in torch's dispatcher, by which a trace shows that it ran.
        masks: whether it takes an attention mask.
        grouped: whether it takes fewer key heads than query heads.
        compute: query, key, value, mask, causal, scale -> [B, H, Q, D].
        multiple: a head's bytes must be a multiple of this.
        fewest_keys: how many keys it takes at least.
    """

    name: str
    operator: str
    masks: bool
    grouped: bool
    compute: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]
    multiple: int = 1
    fewest_keys: int = 1

    def takes(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Whether it takes these shapes and the mask. Source: torch's sdp_utils.cpp."""
        size = query.shape[-1]
        return (
            size == value.shape[-1]
            and size * query.element_size() % self.multiple == 0
            and key.shape[2] >= self.fewest_keys
            and (mask is None or self.masks)
        )


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    size = q.shape[-1]
    if pad := -size % FLASH_MULTIPLE:
        q, k, v = (F.pad(t, (0, pad)) for t in (q, k, v))
        scale = size**-0.5 if scale is None else scale
    out: Tensor = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[0]
    return out[..., :size] if pad else out


def _flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    bias = _additive(mask, q.dtype)
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)[0]
    return out


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    bias = _additive(mask, q.dtype)
    out: Tensor = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False, 0.0, causal, False, scale=scale)[0]
    return out


def _efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    bias = _additive(mask, q.dtype)
    if bias is not None:  # rows of the bias must begin at multiples of 16 bytes
        keys = bias.shape[-1]
        bias = F.pad(bias, (0, -keys % 16))[..., :keys].expand(*q.shape[:3], keys)
    out: Tensor = aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, 0.0, causal, scale=scale)[0]
    return out


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    bias = _additive(mask, q.dtype)
    out: Tensor = aten._scaled_dot_product_attention_math(q, k, v, bias, 0.0, causal, scale=scale, enable_gqa=True)[0]
    return out


KERNELS = {
    "flash": SdpaKernel("autotune_sdpa_fa", "_scaled_dot_product_flash_attention", False, True, _flash),
    "cudnn": SdpaKernel(
        "autotune_sdpa_cudnn", "_scaled_dot_product_cudnn_attention", True, True, _cudnn, multiple=16, fewest_keys=2
    ),
    "efficient": SdpaKernel(
        "autotune_sdpa_efficient", "_scaled_dot_product_efficient_attention", True, False, _efficient, multiple=16
    ),
    "math": SdpaKernel("autotune_sdpa_math", "_safe_softmax", True, True, _math),
}
ON_CPU = {
    "flash": SdpaKernel("autotune_sdpa_fa", "_scaled_dot_product_flash_attention_for_cpu", True, False, _flash_on_cpu),
    "math": KERNELS["math"],
}


def kernel(backend: str, device: torch.device) -> SdpaKernel | None:
    """The kernel of a backend on a device, or None if it has none."""
    return (ON_CPU if device.type == "cpu" else KERNELS).get(backend)


def register(backend: str) -> str:
    """Register a backend with transformers. Returns its name there."""
    name = KERNELS[backend].name
    seam.register_attention(name, functools.partial(attend, backend))
    return name


def attend(
    backend: str,
    module: torch.nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, Hk, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: calls the kernel if it takes the call, else SDPA.

    Returns:
        [B, Q, H, D].
    """
    chosen = kernel(backend, query.device)
    usual = not dropout and not query.requires_grad and all(kwargs.get(name) is None for name in seam.UNUSUAL)
    if chosen is None or not usual or not chosen.takes(query, key, value, attention_mask):
        return seam.sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    queries, causal = query.shape[2], kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(queries > 1 and attention_mask is None and causal)
    if causal and key.shape[2] > queries:  # a static cache without earlier tokens: its other slots are empty
        key, value = key[:, :, :queries], value[:, :, :queries]
    groups = 1 if chosen.grouped else query.shape[1] // key.shape[1]
    if groups > 1 and queries == 1:  # the queries that share a key take the place of queries in time
        packed = query.reshape(query.shape[0], key.shape[1], groups, query.shape[3])  # [B, Hk, groups, D]
        out = chosen.compute(packed, key, value, attention_mask, causal, scaling)
        return out.reshape(query.shape[0], 1, query.shape[1], -1), None
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    out = chosen.compute(query, key, value, attention_mask, causal, scaling)
    return out.transpose(1, 2).contiguous(), None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a mask into one to add to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
