"""A static KV cache: slots allocated once and reused, so that a decode step always sees the same shapes."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

__all__ = ["CachePool", "DynamicCache", "SlotCache", "run", "step", "unsupported"]

ATTENTION_TYPES = {"full_attention", "sliding_attention"}


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer as transformers sees it; tensors and write position belong to the `SlotCache`, one position for all."""

    is_compileable, is_sliding = True, False  # a sliding window lives in the mask alone
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.slot, self.is_initialized = keys, values, slot, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        return self.slot[0]

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class SlotCache:
    """Keys and values of a batch of sequences in a fixed number of slots per sequence.

    Attributes:
        keys, values: one tensor a layer, [B, Hk, slots, D].
        slot: [1] int64, where the next token goes.
        valid: [B, slots] bool, False on left padding.
    """

    def __init__(self, prompt: DynamicCache, slots: int) -> None:
        """Allocate with the shapes of a prefilled cache, every layer of it full length."""
        filled = tensors(prompt)
        self.keys = [_room(keys, slots) for keys, _ in filled]
        self.values = [_room(values, slots) for _, values in filled]
        batch, device = self.keys[0].shape[0], self.keys[0].device
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.valid = torch.ones(batch, slots, dtype=torch.bool, device=device)
        self._length = 0

    def fill(self, prompt: DynamicCache, mask: torch.Tensor | None) -> None:
        """Start a sequence: take over a prefilled cache.

        Args:
            prompt: every layer [B, Hk, P, D].
            mask: [B, P], 0 on left padding; None when there is none.
        """
        filled = tensors(prompt)
        length = filled[0][0].shape[2]
        for new_pair, keys, values in zip(filled, self.keys, self.values, strict=True):
            for held, new in zip((keys, values), new_pair, strict=True):
                held[:, :, :length] = new
                held[:, :, length : self._length] = 0  # a stale NaN would survive a zero attention weight
        self.valid[:, :length] = True if mask is None else mask.bool()
        self.valid[:, length:] = True
        self.slot.fill_(length)
        self._length = length

    def advance(self) -> None:
        """One token was written."""
        self.slot += 1
        self._length += 1

    def to_dynamic(self, config: PretrainedConfig) -> DynamicCache:
        """What generate would have returned: a cache of the caller's own, filled slots only."""
        cache = DynamicCache(config=config)
        for i, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys[:, :, : self._length].clone(), values[:, :, : self._length].clone(), i)
        return cache

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, slots)."""
        batch, slots = self.valid.shape
        return batch, slots


class CachePool:
    """Slot caches by batch size, lent for one generation each, so that threads never share one.

    Args:
        config: the model's text configuration.
        slots: tokens each sequence has room for.
    """

    def __init__(self, config: PretrainedConfig, slots: int) -> None:
        self.config, self.slots = config, slots
        self._idle: dict[int, list[SlotCache]] = {}
        self._lock = threading.Lock()

    def unsupported(self, config: GenerationConfig) -> str | None:
        """Why a generation does not fit, or None."""
        if config.max_length > self.slots + 1:
            return f"a context beyond the static cache's {self.slots} tokens"
        return None

    @contextmanager
    def lend(self, prompt: DynamicCache, mask: torch.Tensor | None) -> Iterator[SlotCache]:
        """A slot cache filled with a prefilled one ([B, Hk, P, D] a layer; mask [B, P] or None)."""
        batch = tensors(prompt)[0][0].shape[0]
        with self._lock:
            idle = self._idle.setdefault(batch, [])
            cache = idle.pop() if idle else None
        cache = cache or SlotCache(prompt, self.slots)
        cache.fill(prompt, mask)
        try:
            yield cache
        finally:
            with self._lock:
                if not idle:  # one of each size is kept; more were needed only while threads overlapped
                    idle.append(cache)


def unsupported(config: PretrainedConfig) -> str | None:
    """Why layers of this text configuration cannot keep their keys and values in slots, or None."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - ATTENTION_TYPES:
        return f"layers of type {', '.join(sorted(other))} keep no keys and values by slot"
    return None


def step(model: Any, token: torch.Tensor, position: torch.Tensor, cache: SlotCache) -> torch.Tensor:
    """One decode step over slots; writes keys and values at `cache.slot`.

    Args:
        model: the decode module.
        token, position: [B, 1] int64.

    Returns:
        logits [B, V].
    """
    return run(model, token, position, cache.slot, cache.valid, cache.keys, cache.values)


def run(
    model: Any,
    token: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    valid: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
) -> torch.Tensor:
    """`step` over bare tensors, the form that is compiled: no Python state, no shape that changes."""
    index = torch.arange(valid.shape[1], device=slot.device)
    full = (valid & (index <= slot))[:, None, None]  # [B, 1, 1, slots]; models take a 4-D mask as it is
    mask: Any = full
    config = model.config.get_text_config(decoder=True)
    if window := getattr(config, "sliding_window", None):
        near = full & (index > slot - window)
        mask = {"full_attention": full, "sliding_attention": near} if getattr(config, "layer_types", None) else near
    cache = Cache(layers=[SlotLayer(k, v, slot) for k, v in zip(keys, values, strict=True)])
    out = model(token, position_ids=position, attention_mask=mask, past_key_values=cache, use_cache=True)
    logits: torch.Tensor = out.logits[:, -1]
    return logits


def tensors(prompt: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [B, Hk, P, D] of every layer of a prefilled cache."""
    layers = cast("list[Any]", prompt.layers)
    return [(layer.keys, layer.values) for layer in layers]


def example(model: Any, batch: int) -> DynamicCache:
    """One token's keys and values [B, Hk, 1, D] a layer: the shapes that a step is prepared for."""
    prompt = DynamicCache()
    with torch.no_grad():
        token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        model(token, past_key_values=prompt, use_cache=True)
    return prompt


def _room(sample: torch.Tensor, slots: int) -> torch.Tensor:
    """Zeros [B, Hk, slots, D]; on a CPU the system gives the memory page by page as it is first written."""
    batch, heads, _, size = sample.shape
    shape = batch, heads, slots, size
    if sample.device.type != "cpu":
        return sample.new_zeros(shape)
    untouched = numpy.zeros(math.prod(shape) * sample.element_size(), dtype=numpy.uint8)  # calloc; torch would write
    return torch.from_numpy(untouched).view(sample.dtype).view(shape)
