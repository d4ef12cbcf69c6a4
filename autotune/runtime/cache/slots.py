"""A static KV cache: slots allocated once and reused, so that a decode step always sees the same shapes."""

from __future__ import annotations

import copy
import math
import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ...model import seam
from ...model.seam.layers import CacheLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


ATTENTION_TYPES = {"full_attention", "sliding_attention"}
MAX_DISCARDED = 64  # slots past `length` that steps may have written whose result was discarded


class SlotLayer(CacheLayer):  # type: ignore[no-untyped-call]
    """One layer as transformers sees it; tensors and write position belong to the `SlotCache`, one position for all.

    A sliding window lives in the mask alone.
    """

    is_compileable = True
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slot, self.is_initialized = keys, values, slot, True

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.slot, keys)
        self.values.index_copy_(2, self.slot, values)
        return self.keys, self.values

    def filled(self) -> torch.Tensor:
        return self.slot[0]

    def visible(self, queries: int) -> int:
        return self.capacity()

    def capacity(self) -> int:
        return self.keys.shape[2]


class SlotCache:
    """Keys and values of a batch of sequences in a fixed number of slots per sequence.

    Attributes:
        keys, values: one tensor a layer, [rows, Hk, slots, D].
        given: dtype of the keys and values that a prompt brought and a caller gets back.
        slot: [1] int64, where the next token goes.
        valid: [rows, slots] bool, False on left padding.
        batch: sequences in use, B <= rows; rows beyond them repeat the last one, so that nothing new is in them.
        length: tokens that count, of every sequence.
        lasting: whether it will be lent again, so that work which depends on its addresses pays.
        left: what was queued when it was given back; another thread's stream may still read it. None: nothing.
    """

    def __init__(self, prompt: Any, slots: int, rows: int | None = None, dtype: torch.dtype | None = None) -> None:
        """Allocate with the shapes of a prefilled cache, every layer of it full length.

        Args:
            prompt: keys and values [B, Hk, P, D] a layer.
            slots: tokens a sequence has room for.
            rows: sequences to have room for; None means as many as the prompt has.
            dtype: of keys and values here; None means the prompt's.
        """
        filled = seam.keys_and_values(prompt)
        self.batch, self.length, self.lasting = filled[0][0].shape[0], 0, False
        self._capacity, self.given = slots, filled[0][0].dtype
        self.left: Any = None
        rows, device = rows or self.batch, filled[0][0].device
        with torch.inference_mode(False):  # tensors made in inference mode cannot be written outside of it
            self.keys = [_room(keys, rows, slots, dtype or keys.dtype) for keys, _ in filled]
            self.values = [_room(values, rows, slots, dtype or values.dtype) for _, values in filled]
            self.slot = torch.zeros(1, dtype=torch.int64, device=device)
            self.valid = torch.ones(rows, slots, dtype=torch.bool, device=device)

    def fill(self, prompt: Any, mask: torch.Tensor | None) -> None:
        """Start a sequence: take over a prefilled cache.

        Args:
            prompt: every layer [B, Hk, P, D].
            mask: [B, P], 0 on left padding; None when there is none.
        """
        filled = seam.keys_and_values(prompt)
        batch, _, length, _ = filled[0][0].shape
        stale = slice(length, self.length + MAX_DISCARDED)  # a NaN there would survive a zero attention weight
        for new_pair, keys, values in zip(filled, self.keys, self.values, strict=True):
            for held, new in zip((keys, values), new_pair, strict=True):
                held[:batch, :, :length] = new
                held[batch:, :, :length] = new[-1:]
                held[:, :, stale] = 0
        self.valid[:, length:] = True
        self.valid[:batch, :length] = True if mask is None else mask.bool()
        self.valid[batch:, :length] = self.valid[batch - 1, :length]
        self.slot.fill_(length)
        self.batch, self.length, self.given = batch, length, filled[0][0].dtype

    def advance(self, count: int = 1) -> None:
        """So many tokens more, written before, count."""
        self.slot += count
        self.length += count

    def first(self, slots: int) -> SlotCache:
        """The same cache, seen as if it had its first `slots` slots alone."""
        if slots == self.shape[1]:
            return self
        part = copy.copy(self)
        part.keys = [keys[:, :, :slots] for keys in self.keys]
        part.values = [values[:, :, :slots] for values in self.values]
        part.valid = self.valid[:, :slots]
        return part

    def to_dynamic(self, config: PretrainedConfig) -> Any:
        """What generate would have returned: a cache of the caller's own, filled slots only."""
        cache = seam.growing_cache(config)
        for i, pair in enumerate(zip(self.keys, self.values, strict=True)):
            keys, values = (held[: self.batch, :, : self.length].to(self.given, copy=True) for held in pair)
            cache.update(keys, values, i)
        return cache

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, slots)."""
        rows, slots = self.valid.shape
        return rows, slots

    @property
    def layout(self) -> tuple[int, int, int]:
        """(rows, slots, slots that a row takes in memory): all that tells the tensors of one model's caches apart."""
        return *self.shape, self._capacity


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


def steps(model: Any, tokens: torch.Tensor, positions: torch.Tensor, cache: SlotCache) -> torch.Tensor:
    """K decode steps at once; writes keys and values at `cache.slot` and the K - 1 slots after it.

    None of the tokens counts until `SlotCache.advance` says so: one that turns out wrong is hidden by the next mask and
    overwritten by what comes in its place.

    Args:
        model: the decode module.
        tokens, positions: [B, K] int64; room for all K is the caller's to see to.

    Returns:
        logits [B, K, V], those at k having seen tokens 0 to k.
    """
    return forward(model, tokens, positions, cache.slot, cache.valid, cache.keys, cache.values)


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
    return forward(model, token, position, slot, valid, keys, values)[:, -1]


def forward(
    model: Any,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    slot: torch.Tensor,
    valid: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
) -> torch.Tensor:
    """`steps` over bare tensors: nothing is read back from the device, so that it can be compiled and captured."""
    count = tokens.shape[1]
    if count > 1:
        slot = slot + torch.arange(count, dtype=slot.dtype, device=slot.device)  # [K], where each token goes
    index = torch.arange(valid.shape[1], dtype=slot.dtype, device=slot.device)
    full = (valid[:, None] & (index <= slot[:, None]))[:, None]  # [B, 1, K, slots]; models take a 4-D mask as it is
    masks = {"full_attention": full}
    config = model.config.get_text_config(decoder=True)
    if window := getattr(config, "sliding_window", None):
        masks["sliding_attention"] = full & (index > slot[:, None] - window)
    if seam.attention_of(config) == "eager":  # it adds its mask to the scores
        masks = {kind: _additive(mask, keys[0].dtype) for kind, mask in masks.items()}
    mixed = len(masks) > 1 and getattr(config, "layer_types", None)
    mask: Any = masks if mixed else list(masks.values())[-1]
    cache = seam.cache_over(SlotLayer(k, v, slot) for k, v in zip(keys, values, strict=True))
    return seam.logits(model(tokens, position_ids=positions, attention_mask=mask, **seam.over(model, cache, slot)))


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to be added to scores: 0 where True."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _room(sample: torch.Tensor, rows: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [rows, Hk, slots, D]; on a CPU the system gives the memory page by page as it is first written.

    By small pages: every head of every row begins a region of its own, of which huge pages would take 2 MB each for the
    first token (a model of 24 layers and 2 heads, 8 rows: 1.6 GB).
    """
    _, heads, _, size = sample.shape
    shape = rows, heads, slots, size
    size_bytes = math.prod(shape) * dtype.itemsize
    if sample.device.type != "cpu" or not size_bytes:
        return sample.new_zeros(shape, dtype=dtype)
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux has it
        untouched = numpy.zeros(size_bytes, dtype=numpy.uint8)  # calloc; torch would write
        return torch.from_numpy(untouched).view(dtype).view(shape)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
