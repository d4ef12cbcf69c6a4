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

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# rows, slots, slots that a row takes in memory, slots written at once (1, or rows), dtype of keys
Layout = tuple[int, int, int, int, torch.dtype]
MAX_DISCARDED = 64  # largest number of slots past `length` that discarded steps may have written


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
        return *self.shape, self._capacity, self.slot.shape[0], self.keys[0].dtype


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
