"""KV caches that take less of a device's memory: narrow numbers, or the host's memory.

What a narrow cache holds is decoded for one layer at a time, just before attention reads it. So it wins memory, not
time. Codes are those of one token and head, symmetric around zero with the token's own scale, so that tokens can be
added without touching what is stored, and no outlier of one token coarsens another. (transformers' own FP8 cache keeps
the scale of the first prompt for everything after it; its INT4 backends quantise what was quantised again.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ...diagnose.work import Forward, attention_layers
from ...model import seam
from ...model.seam.layers import CacheLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GROWTH = 256  # tokens by which the store grows
GROUP = 32  # numbers of a head that share a 4-bit scale: keys have channels that are always large
IN_FLIGHT = 2  # layers of an offloaded cache on the device: the one that is read and the next

Scheme = Literal["int8", "int4", "fp8"]
Parts = tuple[torch.Tensor, ...]  # codes and what decodes them, [B, Hk, T, ...] each


def encode(states: torch.Tensor, scheme: Scheme) -> Parts:
    """Narrow numbers for keys or values [B, Hk, T, D].

    "int8" and "fp8" (e4m3) keep one float32 scale per token and head. "int4" keeps lowest value and step, float16, for
    each group of 32, and two codes in a byte.
    """
    states = states.float()
    if scheme == "int4":
        groups = _grouped(states)
        finite = torch.finfo(torch.float16)
        low = groups.amin(-1, keepdim=True).clamp(finite.min, finite.max).half()
        step = ((groups.amax(-1, keepdim=True) - low.float()) / 15).clamp(finite.smallest_normal, finite.max).half()
        codes = ((groups - low.float()) / step.float()).round().clamp(0, 15).to(torch.uint8).flatten(-2)
        return codes[..., ::2] | codes[..., 1::2] << 4, low.squeeze(-1), step.squeeze(-1)
    largest = 127.0 if scheme == "int8" else torch.finfo(torch.float8_e4m3fn).max
    scale = (states.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (states / scale).clamp(-largest, largest)
    return (scaled.round().to(torch.int8) if scheme == "int8" else scaled.to(torch.float8_e4m3fn)), scale


def decode(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """The numbers [B, Hk, T, D] that `encode` stored, as near as they can be had."""
    if len(parts) == 2:
        codes, scale = parts
        return (codes.float() * scale).to(dtype)
    packed, low, step = parts
    codes = _grouped(torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2))
    return (codes.float() * step.float()[..., None] + low.float()[..., None]).flatten(-2).to(dtype)


def _grouped(states: torch.Tensor) -> torch.Tensor:
    """[..., D] as [..., D / 32, 32]."""
    return states.reshape(*states.shape[:-1], -1, GROUP)


def bytes_per_head(size: int, scheme: Scheme) -> int:
    """Bytes of one token's keys or values in one head of `size` numbers."""
    return size // 2 + 4 * size // GROUP if scheme == "int4" else size + 4


class NarrowStore:
    """Keys or values of one layer, encoded, in memory that grows by `GROWTH` tokens at a time."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.length = scheme, 0
        self._parts: Parts = ()

    def append(self, states: torch.Tensor) -> None:
        """Take over [B, Hk, T, D]."""
        new, end = encode(states, self.scheme), self.length + states.shape[2]
        if not self._parts or end > self._parts[0].shape[2]:
            room = -(-end // GROWTH) * GROWTH
            grown = tuple(part.new_empty((*part.shape[:2], room, part.shape[3])) for part in new)
            for held, old in zip(grown, self._parts, strict=False):
                held[:, :, : self.length] = old[:, :, : self.length]
            self._parts = grown
        for held, part in zip(self._parts, new, strict=True):
            held[:, :, self.length : end] = part
        self.length = end

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """All that was appended, [B, Hk, T, D]."""
        return decode(tuple(part[:, :, : self.length] for part in self._parts), dtype)

    @property
    def size_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self._parts)


class NarrowLayer(CacheLayer):  # type: ignore[no-untyped-call]
    """One layer with full attention. New tokens are attended to as they are, earlier ones as they were stored."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.stores = NarrowStore(scheme), NarrowStore(scheme)
        self.dtype = torch.float32

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        read_keys, read_values = (
            torch.cat([store.read(self.dtype), new], dim=2) if store.length else new
            for store, new in zip(self.stores, (keys, values), strict=True)
        )
        self.stores[0].append(keys)
        self.stores[1].append(values)
        return read_keys, read_values

    def visible(self, queries: int) -> int:
        return self.filled() + queries

    def filled(self) -> int:
        return self.stores[0].length


@dataclass(frozen=True)
class KvCache:
    """What a variant keeps its keys and values in, one cache a generation.

    Args:
        kind: a narrow scheme of this module's own; "quanto" or "hqq" for INT4 by these libraries; "offloaded" for the
            host's memory, from which each layer is fetched while the one before it computes.
    """

    kind: Literal["int8", "int4", "fp8", "quanto", "hqq", "offloaded"]

    def make(self, config: PretrainedConfig) -> Any:
        """An empty cache for a model of this text configuration. Layers with a sliding window stay as they are: they
        hold few tokens."""
        if self.kind == "offloaded":
            return seam.growing_cache(config, offloading=True)
        if self.kind == "quanto" or self.kind == "hqq":
            return seam.narrow_cache(self.kind, config, bits=4)
        scheme = self.kind
        return seam.replace_layers(seam.growing_cache(config), lambda: NarrowLayer(scheme))

    def returned(self, cache: Any, config: PretrainedConfig) -> Any:
        """What generate gives its caller: a plain cache with the same contents, where it can be read."""
        if not any(isinstance(layer, NarrowLayer) for layer in cache.layers):
            return cache
        plain = seam.growing_cache(config)
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, NarrowLayer):
                keys, values = (store.read(layer.dtype) for store in layer.stores)
                plain.update(keys, values, i)
            else:
                plain.layers[i] = layer
        return plain

    def bytes(self, model: PreTrainedModel, batch: int, tokens: int, element_bytes: int) -> int:
        """Bytes on the model's device when it holds `tokens` tokens of each sequence.

        Args:
            element_bytes: size of a number in a plain cache.
        """
        shape, total = Forward(batch, 0, tokens), 0.0
        layers = attention_layers(model)
        for i, keys in enumerate(layers):
            plain = sum(keys.bytes(shape, element_bytes))
            if keys.window is not None:
                total += plain
            elif self.kind == "offloaded":
                total += plain if i < IN_FLIGHT else 0
            else:
                scheme: Scheme = self.kind if self.kind in ("int8", "fp8") else "int4"
                total += 2 * batch * tokens * keys.kv_heads * bytes_per_head(keys.head_size, scheme)
        return int(total)

    def __str__(self) -> str:
        return "offloaded" if self.kind == "offloaded" else f"stored in {self.kind}"
