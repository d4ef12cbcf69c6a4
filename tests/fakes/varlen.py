"""FlashAttention's kernel for sequences of different lengths, computed by numpy. torch has it on GPUs alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def kernel() -> Iterator[None]:
    """Inside the block, `aten::_flash_attention_forward` takes CPU tensors."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _forward(
    query: torch.Tensor,  # [N, H, D]
    key: torch.Tensor,  # [T, Hk, D]
    value: torch.Tensor,
    order: torch.Tensor,  # [N + 1] int32
    begin: torch.Tensor,
    longest_query: int,
    longest: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float | None = None,
    seqused_k: torch.Tensor,  # [N] int32
    **others: Any,
) -> tuple[torch.Tensor, ...]:
    assert (longest_query, dropout, causal, debug) == (1, 0.0, False, False)
    assert not any(other is not None for other in others.values())
    assert order.tolist() == list(range(len(query) + 1))
    queries, keys, values = (given.float().numpy() for given in (query, key, value))
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[2]
    out = np.zeros_like(queries)
    for n, (first, seen) in enumerate(zip(begin.tolist(), seqused_k.tolist(), strict=False)):
        assert 0 <= seen <= longest
        if not seen:
            continue
        here = slice(first, first + seen)
        assert first >= 0
        assert here.stop <= len(keys), "it reads beyond the cache"
        grouped = queries[n].reshape(kv_heads, heads // kv_heads, size)
        scores = np.einsum("hgd,thd->hgt", grouped, keys[here]) * (size**-0.5 if scale is None else scale)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[n] = np.einsum("hgt,thd->hgd", weights, values[here]).reshape(heads, size)
    none = torch.empty(0)
    result = torch.from_numpy(out).to(query.dtype)
    return result, none, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), none.clone()
