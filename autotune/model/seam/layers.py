"""Base class of our cache layers. It has its own module because it must import transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin


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
