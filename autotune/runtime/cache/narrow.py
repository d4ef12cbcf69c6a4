"""KV caches that take less of a device's memory: narrow numbers, or the host's memory.

A narrow cache is decoded for one layer at a time, just before attention reads it. So it saves memory, not time. Each
token and head is encoded with its own scale. So appending tokens does not change stored ones, and an outlier in one
token does not make another token less precise. INT8 and FP8 codes are symmetric around zero. (transformers' own FP8
cache keeps the scale of the first prompt for everything after it; its INT4 backends quantise again what was quantised
before.)
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

GROWTH = 256  # tokens by which the store grows each time
GROUP = 32  # numbers of a head that share a 4-bit scale; small, because some channels of keys are always large
IN_FLIGHT = 2  # layers of an offloaded cache on the device: the one being read and the next

Scheme = Literal["int8", "int4", "fp8"]
Parts = tuple[torch.Tensor, ...]  # codes and the numbers that decode them (scale, lowest value), [B, Hk, T, ...] each


def encode(states: torch.Tensor, scheme: Scheme) -> Parts:
    """Encode keys or values [B, Hk, T, D] as narrow numbers.

    "int8" and "fp8" (e4m3) keep one float32 scale per token and head. "int4" keeps the lowest value and the step of
    each group of 32 in float16, and two codes in a byte.
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
    """Decode what `encode` stored into numbers [B, Hk, T, D], up to rounding."""
    if len(parts) == 2:
        codes, scale = parts
        return (codes.float() * scale).to(dtype)
    packed, low, step = parts
    codes = _grouped(torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2))
    return (codes.float() * step.float()[..., None] + low.float()[..., None]).flatten(-2).to(dtype)


def _grouped(states: torch.Tensor) -> torch.Tensor:
    """View [..., D] as [..., D / 32, 32]."""
    return states.reshape(*states.shape[:-1], -1, GROUP)


def bytes_per_head(size: int, scheme: Scheme) -> int:
    """Bytes of one token's keys or values in one head of `size` numbers."""
    return size // 2 + 4 * size // GROUP if scheme == "int4" else size + 4


class NarrowStore:
    """Keys or values of one layer, encoded, in memory that grows by `GROWTH` tokens at a time."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.length = 0
        self._parts: Parts = ()

    def append(self, states: torch.Tensor) -> None:
        """Encode and store [B, Hk, T, D]."""
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
        """Decode all tokens, [B, Hk, T, D]."""
        return decode(tuple(part[:, :, : self.length] for part in self._parts), dtype)

    @property
    def size_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self._parts)


class NarrowLayer(CacheLayer):  # type: ignore[no-untyped-call]
    """One layer with full attention. It attends to new tokens at full precision, to earlier ones as stored."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.stores = NarrowStore(scheme), NarrowStore(scheme)
        self.dtype = torch.float32

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.dtype = keys.dtype
        self.device = keys.device
        self.is_initialized = True
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
    """The kind of cache in which a variant keeps keys and values; each generation gets one cache.

    Args:
        kind: "int8", "fp8" or "int4" for this module's schemes; "quanto" or "hqq" for INT4 by these libraries;
            "offloaded" for the host's memory, from which each layer is fetched while the one before it computes.
    """

    kind: Literal["int8", "int4", "fp8", "quanto", "hqq", "offloaded"]

    def make(self, config: PretrainedConfig) -> Any:
        """Make an empty cache for a model of this text configuration. Layers with a sliding window hold few tokens and
        stay plain."""
        if self.kind == "offloaded":
            return seam.growing_cache(config, offloading=True)
        if self.kind == "quanto" or self.kind == "hqq":
            return seam.narrow_cache(self.kind, config, bits=4)
        scheme = self.kind
        return seam.replace_layers(seam.growing_cache(config), lambda: NarrowLayer(scheme))

    def returned(self, cache: Any, config: PretrainedConfig) -> Any:
        """The cache that generate returns: a plain one with the same contents, if this module can decode it."""
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
