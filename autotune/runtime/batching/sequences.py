"""The sequences that the engine has under way: their rows, keys and values, and those that gave up a row."""

from __future__ import annotations

from collections import Counter
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...errors import VariantError
from ...machine import outside
from ..cache.rows import RowCache
from ..loop_state import largest
from . import rows as plan
from .guessing import Guessing

if TYPE_CHECKING:
    from ..steps.step import Step
    from ..variant import Variant
    from .request import Request


class _Evicted(NamedTuple):
    """A sequence that gave up its row.

    Args:
        cache: its keys and values.
        token: its last token, which is not in the cache yet.
    """

    request: Request
    cache: Any
    token: int


class Sequences:
    """Sequences that are decoded together. Called in the engine's thread alone.

    Args:
        variant: decodes over slots with recorded steps.
        most: how many sequences are decoded together.
        counts: of the engine, which are kept up to date.

    Attributes:
        rows: the request of each row; None where a row is free.
        together: number of sequences -> steps that decoded so many.
    """

    def __init__(self, variant: Variant, most: int, counts: Counter[str]) -> None:
        self.variant = variant
        self.counts = counts
        self.together: Counter[int] = Counter()
        self.rows: list[Request | None] = [None] * most
        self._evicted = list[_Evicted]()
        self._cache: RowCache | None = None
        self._steps: dict[int, tuple[RowCache, Step]] = {}
        self._token = torch.zeros(most, 1, dtype=torch.int64, device="cpu")
        self._numbers = self._token.numpy()  # the same memory
        self._guessing = Guessing(variant)

    @property
    def free(self) -> int:
        """Number of free rows."""
        return self.rows.count(None)

    @property
    def used(self) -> int:
        """Number of sequences that a step decodes."""
        return len(self.rows) - self.free

    @property
    def usage(self) -> float:
        """Share of the slots of all rows that hold tokens."""
        cache = self._cache
        return sum(cache.lengths) / cache.valid.numel() if cache is not None else 0.0

    def requests(self) -> list[Request]:
        """All requests under way."""
        return [*(evicted.request for evicted in self._evicted), *filter(None, self.rows)]

    def join(self, request: Request, cache: Any, token: int) -> None:
        """Give a sequence a free row.

        Args:
            cache: its keys and values [1, Hk, P, D] per layer.
            token: its next token.
        """
        if self._cache is None:
            pool = self.variant.caches
            assert pool is not None  # noqa: S101 - the transform checked; for the type checker
            self._cache = RowCache(cache, pool.slots, len(self.rows), pool.dtype)
        row = self.rows.index(None)
        self._cache.join(row, cache)
        self.rows[row] = request
        self._numbers[row] = token

    def evict_for(self, order: float) -> None:
        """If no row is free, take the least urgent sequence's row for a request of this order if it is more urgent."""
        if self.free or self._cache is None or len(self._evicted) == len(self.rows):
            return
        last, row = max((request.terms.order, row) for row, request in enumerate(self.rows) if request is not None)
        if order < last and (request := self.rows[row]) is not None:
            self._evicted.append(_Evicted(request, self._cache.copy_of(row), int(self._numbers[row, 0])))
            self._leave(row)
            self.counts["evicted"] += 1

    def resume_before(self, order: float) -> None:
        """Give free rows to evicted sequences that are more urgent than a request of this order."""
        for first in sorted(self._evicted, key=lambda each: each.request.terms.order):
            if not self.free or order < first.request.terms.order:
                return
            self._evicted.remove(first)
            self.join(*first)

    def drop_violated(self, now_s: float) -> None:
        """End the sequences whose terms are violated."""
        for row, request in enumerate(self.rows):
            if request is not None and (error := request.violated(now_s)):
                self._leave(row)
                request.fail(error)
        for evicted in tuple(self._evicted):
            if error := evicted.request.violated(now_s):
                self._evicted.remove(evicted)
                evicted.request.fail(error)

    def fail(self, error: BaseException) -> None:
        """Fail all requests under way."""
        for evicted in self._evicted:
            evicted.request.fail_with_others(error)
        self._evicted.clear()
        self._fail_rows(error)

    def _fail_rows(self, error: BaseException) -> None:
        for row, request in enumerate(self.rows):
            if request is not None:
                self._leave(row)
                request.fail_with_others(error)

    def step(self) -> None:
        """Decode one token of every sequence that has a row."""
        together = self.used
        try:
            logits = self.logits()
        except Exception as error:
            outside.pass_on(error)
            self._fail_rows(error)
            return
        best = largest(logits)
        most = logits.numpy()[range(len(best)), best]  # NaN if any logit is
        for row, request in enumerate(self.rows[: len(logits)]):
            if request is None:
                continue
            try:
                if isnan(most[row]):
                    raise VariantError(f"NaN logits at token {request.tokens}")
                token = int(best[row]) if request.is_greedy else request.choose(logits[row : row + 1])
                finished = request.take(token)
            except Exception as error:  # of the caller's processors or criteria, or NaN: it concerns this row alone
                outside.pass_on(error)
                self._leave(row)
                request.fail(error)
                continue
            self._numbers[row] = token
            if finished:
                self._leave(row)
                request.finish()
        self.together[together] += 1

    def logits(self) -> torch.Tensor:
        """Run a step. Returns logits [rows, V] of as many rows as were computed."""
        cache = self._cache
        assert cache is not None  # noqa: S101 - a sequence has joined; for the type checker
        for source, target in plan.moves([r is not None for r in self.rows], len(self.rows)):
            cache.move(source, target)
            self.rows[target], self.rows[source] = self.rows[source], None
            self._numbers[target] = self._numbers[source]
        size = plan.size_for([r is not None for r in self.rows], len(self.rows))
        speculation, first = self.variant.speculation, self.rows[0]
        if speculation is not None and first is not None and self.used == 1:
            guessing = self._guessing.of(first, cache.single(0), self._plain)
            logits = guessing(self._token[:1].clone(), cache.slot[:1, None])  # a copy: it may be read steps later
            cache.step_done(discarded=speculation.tokens)
        else:
            self._guessing.end()
            logits = self._plain(self._token[:size], cache.slot[:size, None])
            cache.step_done()
        self.counts["tokens"] += self.used
        return logits

    def _plain(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """token, position [rows, 1] -> logits [rows, V], by the recorded step of so many rows."""
        size, cache = len(token), self._cache
        assert cache is not None  # noqa: S101 - a sequence has joined; for the type checker
        if size not in self._steps:
            self._steps[size] = self._prepared(cache.upper(size))
        view, step = self._steps[size]
        with self.variant.running("decode"):
            logits = step(token, position, view)
        self.counts["steps"] += 1
        self.counts["rows"] += size
        return logits

    def _prepared(self, view: RowCache) -> tuple[RowCache, Step]:
        programs = self.variant.step
        with self.variant.preparing(view.shape[0]):
            step = programs.fitting(view) if programs is not None else None
            if step is None:
                raise VariantError(f"there is no recorded step for {view.shape[0]} rows")
            return view, step

    def _leave(self, row: int) -> None:
        if self.rows[row] is self._guessing.request:
            self._guessing.end()
        self.rows[row] = None
        self._numbers[row] = 0
        if self._cache is not None:
            self._cache.leave(row)
