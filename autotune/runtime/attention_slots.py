"""Attention over slots by FlashAttention's kernel for sequences of different lengths.

The kernel reads from the device where the keys of each sequence begin and how many there are. So a query reads the
slots that it sees and no others, and there is neither a mask nor a copy of keys for each query head that shares them.
Every query is a sequence of its own: left padding, a sliding window and several tokens at once are all a first slot and
a number of slots, and where query heads share keys, the kernel splits a long context over the whole GPU.

Source: torch's flash_attn/flash_api.cpp, mha_varlen_fwd.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import VariantError
from ..model import seam

IMPLEMENTATION = "autotune_slots"  # its name in transformers' registry of attention implementations
OPERATOR = "_flash_attention_forward"  # its name in torch's dispatcher, by which a trace shows that it ran


def is_used(model_or_config: Any) -> bool:
    """Whether a model's attention is asked for by `IMPLEMENTATION`."""
    return seam.attention_of(model_or_config) == IMPLEMENTATION


def spans(last: Tensor, padding: Tensor, window: int | None, keys: Tensor) -> Tensor:
    """What queries see, as a tensor of four dimensions that models hand on as they do a mask.

    Args:
        last: [B or 1, K or 1] int64, the last slot that each query sees.
        padding: [B, 1] int64, slots of each row before its first token.
        window: slots that a query sees at most; None: all.
        keys: [B, Hk, slots, D], of any layer: all have the same shape and strides.

    Returns:
        [3, 1, 1, B * K + 1] int32: the number of queries before each query, where its first key is, in slots from the
        first row's, and how many keys it sees. The last entry of the second and third is not used.
    """
    first = padding if window is None else torch.maximum(padding, last - (window - 1))
    seen = (last + 1 - first).clamp(min=0)  # of a row without a sequence, all slots are padding
    rows = torch.arange(keys.shape[0], dtype=last.dtype, device=last.device)[:, None]
    begin = (first + rows * _slots_apart(keys)).expand_as(seen)
    order = torch.arange(seen.numel() + 1, dtype=torch.int32, device=last.device)
    found = F.pad(torch.stack((begin, seen)).flatten(1), (0, 1)).to(torch.int32)
    return torch.cat((order[None], found))[:, None, None]


def attend(
    module: torch.nn.Module,
    query: Tensor,  # [B, H, K, D]
    key: Tensor,  # [B, Hk, slots, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: calls the kernel if the mask is `spans`, else SDPA. Returns [B, K, H, D].

    Raises:
        VariantError: the model's attention over slots has an argument that the kernel does not take.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return seam.sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if unusual := [name for name in seam.UNUSUAL if kwargs.get(name) is not None]:
        raise VariantError(f"slot_attention: the kernel does not take {', '.join(unusual)}, which this model asks for")
    order, begin, seen = attention_mask.flatten(1)
    rows, heads, queries, size = query.shape
    given = query.transpose(1, 2).reshape(-1, heads, size)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        given, _by_slot(key), _by_slot(value), order, begin, 1, key.shape[2], 0.0, False, False,
        scale=scaling, seqused_k=seen[:-1],
    )[0]  # fmt: skip
    return out.view(rows, queries, heads, size), None


def _slots_apart(held: Tensor) -> int:
    """Slots between the beginnings of two rows of [B, Hk, slots, D]."""
    return held.stride(0) // held.stride(2)


def _by_slot(held: Tensor) -> Tensor:
    """[B, Hk, slots, D] as [T, Hk, D], in which row b begins at `b * _slots_apart`. A view: nothing is copied."""
    rows, heads, slots, size = held.shape
    length = (rows - 1) * _slots_apart(held) + slots
    return held.as_strided((length, heads, size), (held.stride(2), held.stride(1), 1))
