"""The model computed over the slots of a static KV cache: one decode step, several at once, or a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...model import seam
from ...model.configured import text_config
from ...model.seam.layers import CacheLayer
from .. import attention_slots
from ..attention_sdpa import KERNELS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .slots import SlotCache

ATTENTION_TYPES = {"full_attention", "sliding_attention"}
# Implementations that add a mask of four dimensions to the scores. Made here, the mask is made once for all layers.
ADDING = {"eager", "flex_attention", *(KERNELS[name].name for name in ("cudnn", "efficient"))}


class SlotLayer(CacheLayer):  # type: ignore[no-untyped-call]
    """One layer of a slot cache as transformers sees it. The `SlotCache` owns its tensors and the common position.

    A sliding window exists only in the mask.
    """

    is_compileable = True
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor, *, by_row: bool = False) -> None:
        super().__init__()
        self.by_row = by_row
        self.keys = keys
        self.values = values
        self.slot = slot
        self.is_initialized = True

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if keys.dtype != self.keys.dtype:  # a cast to the same dtype is dispatched, too
            keys, values = keys.to(self.keys.dtype), values.to(self.values.dtype)
        if self.by_row:
            slots = self.slot.view(-1, 1, 1, 1)
            self.keys.scatter_(2, slots.expand(keys.shape), keys)
            self.values.scatter_(2, slots.expand(values.shape), values)
        else:
            self.keys.index_copy_(2, self.slot, keys)
            self.values.index_copy_(2, self.slot, values)
        return self.keys, self.values

    def filled(self) -> torch.Tensor:
        return self.slot[0]

    def visible(self, queries: int) -> int:
        return self.capacity()

    def capacity(self) -> int:
        return self.keys.shape[2]


def unsupported(config: PretrainedConfig) -> str | None:
    """Why layers of this text configuration cannot keep keys and values in slots, or None."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - ATTENTION_TYPES:
        return f"layers of type {', '.join(sorted(other))} keep no keys and values by slot"
    return None


def step(model: Any, token: torch.Tensor, position: torch.Tensor, cache: SlotCache) -> torch.Tensor:
    """Run one decode step over slots. It writes keys and values at `cache.slot`.

    Args:
        model: the decode module.
        token, position: [B, 1] int64.

    Returns:
        logits [B, V].
    """
    return run(model, token, position, cache.slot, cache.valid, cache.keys, cache.values)


def steps(model: Any, tokens: torch.Tensor, positions: torch.Tensor, cache: SlotCache) -> torch.Tensor:
    """Run K decode steps at once. They write keys and values at `cache.slot` and the K - 1 slots after it.

    A token is valid only after `SlotCache.advance`. The next mask hides a wrong token, and the token that replaces it
    overwrites it.

    Args:
        model: the decode module.
        tokens, positions: [B, K] int64; the caller must make sure that K slots are free.

    Returns:
        logits [B, K, V]; those at k depend on tokens 0 to k.
    """
    return forward(model, tokens, positions, cache.slot, cache.valid, cache.keys, cache.values)


def prompt(model: Any, tokens: torch.Tensor, positions: torch.Tensor, cache: SlotCache) -> torch.Tensor:
    """Compute a prompt. It writes keys and values from slot 0 on, as many as there are tokens.

    Tokens after `cache.slot` fill the prompt up: no token sees them, and steps overwrite their slots. They repeat the
    token at `cache.slot` and its position, so that they get its numbers, which are finite where the prompt's are.

    Args:
        model: the prefill module.
        tokens, positions: [B, P] int64.

    Returns:
        logits [B, V] of the token at `cache.slot`.
    """
    first = torch.zeros(1, dtype=torch.int64, device=cache.slot.device)
    return forward(model, tokens, positions, first, cache.valid, cache.keys, cache.values, cache.slot)[:, 0]


def run(
    model: Any,
    token: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    valid: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
) -> torch.Tensor:
    """`step` over bare tensors, the form that is compiled: it has no Python state and no changing shapes."""
    return forward(model, token, position, slot, valid, keys, values)[:, -1]


def forward(
    model: Any,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    slot: torch.Tensor,
    valid: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """`steps` over bare tensors. It reads nothing back from the device, so that it can be compiled and captured.

    Args:
        slot: [1], the slot of the first token of every sequence; or [B], that of each sequence's only token.
        kept: [1] int64, the token of a prompt from slot 0 on whose logits are returned; those after it see what it
            sees. None: the logits of all are returned.
    """
    count, by_row = tokens.shape[1], slot.shape[0] > 1
    if count > 1:
        slot = slot + torch.arange(count, dtype=slot.dtype, device=slot.device)  # [K], the slot of each token
    seen = slot if kept is None else torch.minimum(slot, kept)  # the last slot that each token sees
    config = text_config(model)
    visible = _spans if attention_slots.is_used(config) else _masks
    masks = visible(config, seen, valid, keys[0], by_row)
    mixed = len(masks) > 1 and getattr(config, "layer_types", None)
    mask: Any = masks if mixed else list(masks.values())[-1]
    cache = seam.cache_over(SlotLayer(k, v, slot, by_row=by_row) for k, v in zip(keys, values, strict=True))
    at = slot[:1] if by_row else slot  # of a batch whose rows differ, the library is told the first row's
    given: dict[str, Any] = seam.over(model, cache, at) | (seam.logits_at(model, kept) if kept is not None else {})
    found = seam.logits(model(tokens, position_ids=positions, attention_mask=mask, **given))
    return found if kept is None or found.shape[1] == len(kept) else found.index_select(1, kept)


def _masks(
    config: PretrainedConfig, seen: torch.Tensor, valid: torch.Tensor, keys: torch.Tensor, by_row: bool
) -> dict[str, torch.Tensor]:
    """What each kind of layer sees, [B, 1, K, slots]; models use a mask of four dimensions unchanged."""
    last = seen[:, None, None] if by_row else seen[:, None]  # [B, 1, 1] or [K, 1]
    index = torch.arange(valid.shape[1], dtype=seen.dtype, device=seen.device)
    full = (valid[:, None] & (index <= last))[:, None]
    masks = {"full_attention": full}
    if window := getattr(config, "sliding_window", None):
        inside = index > last - window
        masks["sliding_attention"] = full & (inside[:, None] if by_row else inside)
    if seam.attention_of(config) in ADDING:
        masks = {kind: _additive(mask, keys.dtype) for kind, mask in masks.items()}
    return masks


def _spans(
    config: PretrainedConfig, seen: torch.Tensor, valid: torch.Tensor, keys: torch.Tensor, by_row: bool
) -> dict[str, torch.Tensor]:
    """What each kind of layer sees, as `attention_slots.spans`."""
    last = seen[:, None] if by_row else seen[None]  # [B, 1] or [1, K]
    padding = valid.shape[1] - valid.sum(1, keepdim=True)  # [B, 1]
    windows = {"full_attention": None}
    if window := getattr(config, "sliding_window", None):
        windows["sliding_attention"] = window
    return {kind: attention_slots.spans(last, padding, window, keys) for kind, window in windows.items()}


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a boolean mask into one to add to scores: 0 where True."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
