"""Transformers' own KV caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .arguments import cache_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .layers import CacheLayer


def cache_over(layers: Iterable[CacheLayer]) -> Any:
    """A cache of these layers."""
    from transformers.cache_utils import Cache

    return Cache(layers=list(layers))


def growing_cache(config: PretrainedConfig | None = None, offloading: bool = False) -> Any:
    """A cache that grows with its tokens.

    Args:
        config: the text model's; layers with a sliding window keep only the window. None: all layers keep all tokens.
        offloading: whether all layers except the one in use are kept in the host's memory.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=config, offloading=offloading)
    if config is None and hasattr(cache, "layer_class_to_replicate"):
        from .layers import GrowingLayer

        cache.layer_class_to_replicate = GrowingLayer
    return cache


def narrow_cache(backend: str, config: PretrainedConfig, bits: int) -> Any:
    """Transformers' own quantised cache; `backend` names the library that quantises."""
    from transformers import QuantizedCache

    return QuantizedCache(backend, config, nbits=bits)


def replace_layers(cache: Any, make: Callable[[], CacheLayer]) -> Any:
    """Replace every layer that keeps all tokens unchanged; returns the same cache."""
    from transformers.cache_utils import DynamicLayer

    cache.layers = [make() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keys_and_values(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [B, Hk, T, D] of every layer of a filled cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def appends(cache: Any, layer: int) -> bool:
    """Whether a cache's layer stores keys and values after those that it holds, and asks for nothing besides them."""
    from transformers.cache_utils import DynamicLayer

    from .layers import CacheLayer

    layers = getattr(cache, "layers", None)
    return layers is not None and (layer >= len(layers) or isinstance(layers[layer], DynamicLayer | CacheLayer))


def is_unfilled(cache: Any, layers: Iterable[int]) -> bool:
    """Whether a cache holds no tokens, and these of its layers take keys and values as they come (`appends`)."""
    return all(appends(cache, layer) for layer in layers) and int(cache.get_seq_length()) == 0


def counts_tokens(cache: Any) -> bool:
    """Whether a cache has layers that keep keys and values per token. Those of state-space models do not."""
    return any(hasattr(layer, "get_seq_length") for layer in getattr(cache, "layers", ()))


def is_decoding(given: Mapping[str, Any]) -> bool:
    """Whether a forward with these keyword arguments is a decode step: one token, and a cache that holds others."""
    cache = cache_in(given)
    if cache is None or given["input_ids"].shape[1] != 1:
        return False
    if not hasattr(cache, "layers"):  # Mamba's, to 5.3
        position = given.get("cache_position")
        return position is not None and int(position[-1]) > 0
    if counts_tokens(cache):
        return int(cache.get_seq_length()) > 0
    return bool(cache.layers) and bool(cache.has_previous_state())
