"""Causal attention of a prompt's tokens in a kernel, as transformers' attention interface calls it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model import seam
from . import kernels
from .kernels.bf16 import ARITHMETIC

# precision -> BF16 numbers that an FP32 number is split into
PARTS = {"float32": 0, **{name: parts for parts, name in ARITHMETIC.items()}}
NAMES = {precision: f"autotune_{precision}_prefill" for precision in PARTS}  # in transformers' registry
PARTS_BY_NAME = {NAMES[precision]: parts for precision, parts in PARTS.items()}


class SeenKeys(NamedTuple):
    """What the kernel computes.

    Args:
        spans: INT32 [B or 1, Q, 2], the first key that each query sees and the one after its last; None: causal.
        scale: factor of the scores.
    """

    spans: Tensor | None
    scale: float


def register(precision: str) -> None:
    """Register the kernel with transformers."""
    seam.register_attention(NAMES[precision], functools.partial(attend, PARTS[precision]))


def attend(
    parts: int,
    module: torch.nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, Hk, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: calls the kernel if every query sees an unbroken span of keys, else SDPA.

    Returns:
        [B, Q, H, D].
    """
    if not query.requires_grad and query.device.type == "cpu":
        _, _, queries, depth = query.shape
        given = {"scaling": scaling, "dropout": dropout, **kwargs}
        if (seen := seen_by(module, queries, key.shape[2], depth, attention_mask, given)) is not None:
            return kernels.attend_many(query, key, value, *seen, parts), None
    return seam.sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def seen_by(
    module: torch.nn.Module, queries: int, keys: int, depth: int, mask: Tensor | None, given: dict[str, Any]
) -> SeenKeys | None:
    """What the kernel computes for a call of the attention interface; None if it does not take the call.

    Args:
        module: the attention block that calls.
        depth: D, the size of a head.
        given: the other arguments of the call.
    """
    if queries < 2 or given.get("dropout") or any(given.get(name) is not None for name in seam.UNUSUAL):
        return None
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    spans = _spans(mask, queries, keys)
    if spans is None and not (mask is None and causal and queries == keys):
        return None
    scaling = given.get("scaling")
    return SeenKeys(spans, depth**-0.5 if scaling is None else scaling)


def _spans(mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """The first key that each query sees and the one after its last, as [B or 1, Q, 2]; None for any other mask."""
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, queries, keys):
        return None
    spans: Tensor = torch.ops.autotune.mask_spans(mask)
    return spans if spans.numel() else None
