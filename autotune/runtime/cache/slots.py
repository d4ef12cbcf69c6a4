"""A static KV cache: its slots are allocated once and reused, so that a decode step always sees the same shapes."""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ...machine import device as devices
from ...model import seam
from ...model.configured import text_config
from ...model.seam.layers import CacheLayer
from ..attention_sdpa import KERNELS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


ATTENTION_TYPES = {"full_attention", "sliding_attention"}
# Implementations that add a mask of four dimensions to the scores. Made here, the mask is made once for all layers.
ADDING = {"eager", "flex_attention", *(KERNELS[name].name for name in ("cudnn", "efficient"))}
Layout = tuple[int, int, int, int]  # rows, slots, slots that a row takes in memory, slots written at once: 1, or rows
MAX_DISCARDED = 64  # largest number of slots past `length` that discarded steps may have written


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


class SlotCache:
    """Keys and values of a batch of sequences in a fixed number of slots per sequence.

    Attributes:
        keys, values: one tensor per layer, [rows, Hk, slots, D].
        given: dtype of the prompt's keys and values, which is also what a caller gets back.
        slot: [1] int64, the slot of the next token.
        valid: [rows, slots] bool, False on left padding.
        batch: sequences in use, B <= rows; further rows repeat the last sequence.
        length: valid tokens of every sequence.
        lasting: whether it will be lent again, so that work which depends on its addresses pays.
        left: work that was queued when it was given back; another thread's stream may still read it. None: nothing.
    """

    def __init__(self, prompt: Any, slots: int, rows: int | None = None, dtype: torch.dtype | None = None) -> None:
        """Allocate with the shapes of a prefilled cache whose layers all hold the full length.

        Args:
            prompt: keys and values [B, Hk, P, D] per layer.
            slots: tokens a sequence has room for.
            rows: sequences to allocate; None means as many as the prompt has.
            dtype: dtype of keys and values in slots; None means the prompt's.
        """
        filled = seam.keys_and_values(prompt)
        self.batch = filled[0][0].shape[0]
        self.length = 0
        self._padded = 0  # slots that a padded prompt wrote
        self.lasting = False
        self._capacity = slots
        self.given = filled[0][0].dtype
        self.left: Any = None
        rows, device = rows or self.batch, filled[0][0].device
        with torch.inference_mode(False):  # tensors made in inference mode cannot be written outside it
            self.keys = [_room(keys, rows, slots, dtype or keys.dtype) for keys, _ in filled]
            self.values = [_room(values, rows, slots, dtype or values.dtype) for _, values in filled]
            self.slot = torch.zeros(1, dtype=torch.int64, device=device)
            self.valid = torch.ones(rows, slots, dtype=torch.bool, device=device)
        self._look_at_slot()

    def fill(self, prompt: Any, mask: torch.Tensor | None) -> None:
        """Start a sequence: copy a prefilled cache.

        Args:
            prompt: keys and values [B, Hk, P, D] per layer.
            mask: [B, P], 0 on left padding; None if there is no padding.
        """
        filled = seam.keys_and_values(prompt)
        batch, _, length, _ = filled[0][0].shape
        self._write(slice(batch), filled)
        if batch < len(self.valid):
            self._write(slice(batch, None), [(keys[-1:], values[-1:]) for keys, values in filled])
        self.given = filled[0][0].dtype
        self.begin(batch, length, mask)

    def wrote(self, length: int, given: torch.dtype) -> None:
        """Note that the first `length` slots hold numbers now, which were `given` in this dtype."""
        self.length = max(self.length, length)
        self.given = given

    def begin(self, batch: int, length: int, mask: torch.Tensor | None) -> None:
        """Start a sequence whose keys and values are in the first `length` slots.

        Args:
            batch: sequences, B; further rows repeat the last one.
            length: tokens of each, P.
            mask: [B, P], 0 on left padding; None if there is no padding.
        """
        self._clear(slice(None), self._stale(length))
        self.valid[:, length:] = True
        self.valid[:batch, :length] = True if mask is None else mask.bool()
        self.valid[batch:, :length] = self.valid[batch - 1, :length]
        self.slot.fill_(length)
        self.batch = batch
        self.length = length

    def begin_padded(self, length: int, padded: int) -> None:
        """Start a sequence whose prompt is computed in these slots by `prompt`; then call `advance`.

        Args:
            length: tokens of the prompt.
            padded: tokens that are computed, the prompt's and others after it, which no later step sees.
        """
        self._clear(slice(None), self._stale(length))
        self.valid.fill_(True)
        self.slot.fill_(length - 1)
        self.batch = len(self.valid)
        self.length = length - 1
        self._padded = padded

    def _stale(self, length: int) -> slice:
        """The slots after `length` tokens that the last sequence may have written."""
        end, self._padded = max(self.length + MAX_DISCARDED, self._padded), 0
        return slice(length, end)

    def _write(self, rows: slice, filled: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Write keys and values into rows from slot 0 on, in few operators.

        Args:
            filled: [B, Hk, P, D] per layer, of as many sequences as rows, or of one for all.
        """
        rooms = [held[rows] for pair in zip(self.keys, self.values, strict=True) for held in pair]
        given = [new for pair in filled for new in pair]
        torch._foreach_copy_([room[:, :, : new.shape[2]] for room, new in zip(rooms, given, strict=True)], given)

    def _clear(self, rows: slice, stale: slice) -> None:
        """Write zeros into slots, because a NaN that an earlier sequence left stays NaN at attention weight 0."""
        torch._foreach_zero_([held[rows, :, stale] for held in (*self.keys, *self.values)])

    def advance(self, count: int = 1) -> None:
        """Make the next `count` tokens valid; their slots are written already."""
        self.length += count
        if self._slot is not None:
            self._slot[0] = self.length  # an operator takes 40 us after a step
        else:
            self.slot += count

    def _look_at_slot(self) -> None:
        """Write to the memory of `slot` through numpy from now on, if it is the host's."""
        self._slot = self.slot.numpy() if devices.of(self.slot.device).is_host else None

    def first(self, slots: int) -> SlotCache:
        """A view of this cache with only its first `slots` slots."""
        if slots == self.shape[1]:
            return self
        part = copy.copy(self)
        part.keys = [keys[:, :, :slots] for keys in self.keys]
        part.values = [values[:, :, :slots] for values in self.values]
        part.valid = self.valid[:, :slots]
        return part

    def to_dynamic(self, config: PretrainedConfig) -> Any:
        """Copy the filled slots into the kind of cache that generate would have returned."""
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
    def longest(self) -> int:
        """Valid tokens of the longest sequence."""
        return self.length

    @property
    def layout(self) -> Layout:
        """Everything in which caches of one model differ."""
        return *self.shape, self._capacity, self.slot.shape[0]


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
    last = seen[:, None, None] if by_row else seen[:, None]  # [B, 1, 1] or [K, 1]
    index = torch.arange(valid.shape[1], dtype=slot.dtype, device=slot.device)
    full = (valid[:, None] & (index <= last))[:, None]  # [B, 1, K, slots]; models use a 4-D mask unchanged
    masks = {"full_attention": full}
    config = text_config(model)
    if window := getattr(config, "sliding_window", None):
        inside = index > last - window
        masks["sliding_attention"] = full & (inside[:, None] if by_row else inside)
    if seam.attention_of(config) in ADDING:
        masks = {kind: _additive(mask, keys[0].dtype) for kind, mask in masks.items()}
    mixed = len(masks) > 1 and getattr(config, "layer_types", None)
    mask: Any = masks if mixed else list(masks.values())[-1]
    cache = seam.cache_over(SlotLayer(k, v, slot, by_row=by_row) for k, v in zip(keys, values, strict=True))
    at = slot[:1] if by_row else slot  # of a batch whose rows differ, the library is told the first row's
    given: dict[str, Any] = seam.over(model, cache, at) | (seam.logits_at(model, kept) if kept is not None else {})
    found = seam.logits(model(tokens, position_ids=positions, attention_mask=mask, **given))
    return found if kept is None or found.shape[1] == len(kept) else found.index_select(1, kept)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a boolean mask into one to add to scores: 0 where True."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _room(sample: torch.Tensor, rows: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocate zeros [rows, Hk, slots, D]. On a CPU, a page takes memory only when it is first written.

    The pages are small ones. Every head of every row is a separate region, and with huge pages its first token would
    take 2 MB (1.6 GB for a model of 24 layers and 2 heads with 8 rows).
    """
    _, heads, _, size = sample.shape
    shape = rows, heads, slots, size
    size_bytes = math.prod(shape) * dtype.itemsize
    if sample.device.type != "cpu" or not size_bytes:
        return sample.new_zeros(shape, dtype=dtype)
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):  # only Linux has it
        untouched = numpy.zeros(size_bytes, dtype=numpy.uint8)  # numpy calls calloc; torch would write every page
        return torch.from_numpy(untouched).view(dtype).view(shape)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # the kernel may be built without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
