"""Base classes of our cache layers. They have their own module because it must import transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class CacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of our caches, as attention and the masks see it. Subclasses define the methods below."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [B, Hk, S, D]. Returns all keys and values that attention reads, [B, Hk, T, D]."""
        raise NotImplementedError

    def filled(self) -> Any:
        """Number of tokens held, an int or a tensor []."""
        raise NotImplementedError

    def visible(self, queries: int) -> int:
        """Number of tokens that attention reads once `queries` more are stored."""
        raise NotImplementedError

    def capacity(self) -> int:
        """Largest number of tokens that the layer can hold; -1: no limit."""
        return -1

    def lazy_initialization(self, *_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.store(key_states, value_states)

    def get_seq_length(self) -> Any:
        return self.filled()

    def get_mask_sizes(self, queries: Any) -> tuple[int, int]:
        return self.visible(queries if isinstance(queries, int) else int(queries.shape[0])), 0

    def get_max_length(self) -> int:
        return self.capacity()

    def get_max_cache_shape(self) -> int:
        return self.capacity()


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Transformers' layer that grows, without the copy that it makes of the first keys and values.

    On a GPU they are copied: they may be in a graph's memory, which the next replay overwrites.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized or key_states.device.type != "cpu":
            found: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        self.keys, self.values = key_states, value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        return key_states, value_states
