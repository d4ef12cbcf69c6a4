"""Slot caches, each lent for one generation and then kept for the next, so that threads never share one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ...machine import device as devices
from ...machine import forking
from ...model.seam import growing_cache, keys_and_values
from . import prompt as prompts
from .slots import SlotCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ...machine.device import Device
    from ...model.seam import Sampling


SPARE = 0.25  # share of the free memory that a cache may take which only calls at the same time need


class CachePool:
    """A pool of slot caches by number of rows. Each is lent for one generation, so that threads never share one.

    Args:
        config: the model's text configuration.
        slots: tokens each sequence has room for.
        rows: sizes to round a batch up to; a larger batch gets a cache of exactly its size.
        lasting: caches kept for each size; when more generations overlap, the others get caches that are not kept.
        dtype: dtype of keys and values in slots; None means the prompt's.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        slots: int,
        rows: Sequence[int] = (),
        lasting: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config
        self.slots = slots
        self.rows = tuple(sorted(rows))
        self.lasting = lasting
        self.dtype = dtype
        self._idle: dict[int, list[SlotCache]] = {}
        self._made: dict[int, int] = {}
        self._kept: dict[int, int] = {}  # rows -> number of caches whose addresses are recorded
        self._example: Any = None  # keys and values of a token, which tell the shapes of new caches
        self._lock = forking.lock()

    def unsupported(self, call: Sampling) -> str | None:
        """Why a generation does not fit into the slots, or None."""
        if call.longest > self.slots + 1:
            return f"a context beyond the static cache's {self.slots} tokens"
        return None

    def know(self, example: Any) -> None:
        """Take the shapes of new caches from keys and values of a token ([1, Hk, 1, D] per layer) on the host."""
        self._example = example

    def empty(self, rows: int) -> SlotCache | None:
        """An empty cache that is not lent, to record a step with; None as long as no shapes are known."""
        return None if self._example is None else SlotCache(self._example, self.slots, rows, self.dtype)

    @contextmanager
    def read(self, batch: int) -> Iterator[Any]:
        """Lend a cache for prefill to fill: slots, which `lend` then begins with, or one that grows.

        The one that grows is for devices whose work goes on after a call, and as long as no shapes are known.

        Args:
            batch: sequences of the prompt.
        """
        if self._example is None:
            yield growing_cache()  # no configuration: every layer at full length
            return
        with self._lent(self._take(self._example, self._rows(batch))) as cache:
            yield prompts.into(cache, batch)

    @contextmanager
    def lend(self, prompt: Any, mask: torch.Tensor | None) -> Iterator[SlotCache]:
        """Lend a slot cache with a prompt in it.

        Args:
            prompt: from `read`, or any cache with keys and values [B, Hk, P, D] per layer.
            mask: [B, P], 0 on left padding; None if there is no padding.
        """
        if (cache := prompts.begun(prompt, mask)) is not None:
            yield cache
            return
        with self._lent(self._take(prompt, self._rows(batch_of(prompt)))) as cache:
            cache.fill(prompt, mask)
            yield cache

    @contextmanager
    def lend_idle(self, rows: int) -> Iterator[SlotCache | None]:
        """Lend a cache of exactly `rows` rows for `SlotCache.begin_padded`; None if all that there are serve others."""
        with self._lock:
            idle = self._idle.get(rows)
            cache = idle.pop() if idle else None
        with nullcontext() if cache is None else self._lent(cache):
            yield cache

    @contextmanager
    def _lent(self, cache: SlotCache) -> Iterator[SlotCache]:
        """Enclose one generation over a cache that was taken out of the pool."""
        device = devices.of(cache.slot.device)
        if cache.left is not None:
            device.wait(cache.left)
        try:
            yield cache
        finally:
            if cache.lasting:
                cache.left = device.mark()
                with self._lock:
                    self._idle[cache.shape[0]].append(cache)

    @contextmanager
    def keep(self, prompt: Any, most: int) -> Iterator[list[SlotCache]]:
        """Lend up to `most` caches for the prompt's number of rows, whose addresses are recorded meanwhile.

        They are kept for good, even if memory runs out, and later ones of their size are lent only once. One that only
        calls at the same time need is not made if it takes more than `SPARE` of the free memory.
        """
        rows, caches = self._rows(batch_of(prompt)), list[SlotCache]()
        with ExitStack() as lent:
            while len(caches) < most and self._is_spare(caches):
                self._kept[rows] = max(self._kept.get(rows, 0), len(caches) + 1)
                caches.append(lent.enter_context(self.lend(prompt, None)))
            yield caches

    def _is_spare(self, caches: list[SlotCache]) -> bool:
        """Whether there is another cache like these, or room for one."""
        if not caches or self._idle[caches[0].shape[0]]:
            return True
        held = sum(tensor.nbytes for tensor in (*caches[0].keys, *caches[0].values))
        return held <= SPARE * devices.of(caches[0].slot.device).memory().free

    def _rows(self, batch: int) -> int:
        return next((rows for rows in self.rows if rows >= batch), batch)

    def _take(self, prompt: Any, rows: int) -> SlotCache:
        with self._lock:
            if idle := self._idle.setdefault(rows, []):
                return idle.pop()
        try:
            cache = SlotCache(prompt, self.slots, rows, self.dtype)
        except Exception as error:
            device = devices.of(keys_and_values(prompt)[0][0].device)
            if device.failure(error) != "memory" or not self._drop_idle(device):
                raise
            cache = SlotCache(prompt, self.slots, rows, self.dtype)
        with self._lock:
            planned = not self.rows or rows in self.rows
            cache.lasting = planned and self._made.get(rows, 0) < self._kept.get(rows, self.lasting)
            self._made[rows] = self._made.get(rows, 0) + cache.lasting
        return cache

    def _drop_idle(self, device: Device) -> bool:
        """Free the caches that are neither lent nor recorded. Returns whether there were any."""
        device.synchronize()  # graphs that use them may still be running
        with self._lock:
            sizes = {rows: len(idle) for rows, idle in self._idle.items() if idle and rows not in self._kept}
            for rows, count in sizes.items():
                self._idle[rows].clear()
                self._made[rows] -= count
        device.trim()
        return bool(sizes)


def batch_of(prompt: Any) -> int:
    """Sequences of a prefilled cache."""
    batch: int = keys_and_values(prompt)[0][0].shape[0]
    return batch
