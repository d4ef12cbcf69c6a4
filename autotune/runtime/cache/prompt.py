"""A prompt read into slots: they take its keys and values as they are computed, so that no copy lies beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...model import seam
from ...model.seam.layers import CacheLayer

if TYPE_CHECKING:
    from .slots import SlotCache


class PromptLayer(CacheLayer):  # type: ignore[no-untyped-call]
    """One layer of a slot cache while a prompt is read into it.

    Attention over a prompt's first part, most often the whole, sees keys and values as they were computed. A later part
    sees all of them as stored.

    Args:
        cache: the slots; nothing else uses them meanwhile.
        layer: which of its layers.
        batch: sequences of the prompt, B; further rows repeat the last one.
    """

    def __init__(self, cache: SlotCache, layer: int, batch: int) -> None:
        super().__init__()
        self.cache = cache
        self.slots = cache.keys[layer], cache.values[layer]
        self.batch = batch
        self.length = 0
        self.is_initialized = True

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        new = slice(self.length, self.length + keys.shape[2])
        self.length = new.stop
        self.cache.wrote(new.stop, keys.dtype)
        for held, states in zip(self.slots, (keys, values), strict=True):
            held[: self.batch, :, new] = states
            held[self.batch :, :, new] = states[-1:]
        if not new.start:
            return keys, values
        read_keys, read_values = (held[: self.batch, :, : new.stop].to(keys.dtype) for held in self.slots)
        return read_keys, read_values

    def filled(self) -> int:
        return self.length

    def visible(self, queries: int) -> int:
        return self.length + queries


def into(cache: SlotCache, batch: int) -> Any:
    """A cache for prefill that writes into the slots of `cache`; `SlotCache.begin` then starts the sequence."""
    return seam.cache_over(PromptLayer(cache, layer, batch) for layer in range(len(cache.keys)))


def begun(prompt: Any, mask: torch.Tensor | None) -> SlotCache | None:
    """Start the sequences that were read into slots; None if `prompt` has memory of its own.

    Args:
        prompt: from `into`, filled by prefill.
        mask: [B, P], 0 on left padding; None if there is no padding.
    """
    layer = next(iter(prompt.layers), None)
    if not isinstance(layer, PromptLayer):
        return None
    layer.cache.begin(layer.batch, layer.length, mask)
    return layer.cache
