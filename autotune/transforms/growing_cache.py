"""What transforms that exchange a cache that grows have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .static_cache import no_slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..runtime.variant import Variant


def not_growing(variant: Variant) -> str | None:
    """Why a variant's cache cannot be replaced by another growing cache, or None."""
    if variant.kv is not None:
        return f"the KV cache is {variant.kv} already"
    if variant.caches is not None:
        return f"the KV cache is static ({variant.caches.slots} slots)"
    return no_slots(variant.original) or _only_windows(variant.original)


def _only_windows(model: PreTrainedModel) -> str | None:
    from ..diagnose.work import attention_layers

    if any(keys.window is None for keys in attention_layers(model)):
        return None
    return "every layer has a sliding window, which keeps its share of the cache small already"


def other_than(kind: str, variant: Variant) -> str | None:
    if variant.kv is None or variant.caches is not None or variant.loop is None:
        return "the KV cache is a plain one"
    return None if variant.kv.kind == kind else f"the KV cache is {variant.kv}"
