"""The sequences that the engine has under way: their rows, keys and values, and those that gave up a row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...machine import bells, outside
from ..cache import slot_forward
from ..steps.step import preparing
from . import rows as plan
from .guessing import Guessing
from .tokens import DeviceTokens, HostTokens, RowTokens

if TYPE_CHECKING:
    from ..cache.rows import RowCache
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
        variant: decodes over slots.
        caches: number of rows -> cache for a step of so many; all are views of the one with the most.
        counts: of the engine, which are kept up to date.

    Attributes:
        rows: the request of each row; None where a row is free.
        tokens: of each row.
        together: number of sequences -> steps that decoded so many.
    """

    def __init__(self, variant: Variant, caches: Mapping[int, RowCache], counts: Counter[str]) -> None:
        most, device = max(caches), variant.device
        self.variant = variant
        self.counts = counts
        self.together: Counter[int] = Counter()
        self.rows: list[Request | None] = [None] * most
        self._evicted = list[_Evicted]()
        self._caches = caches
        self._cache = caches[most]
        self._steps: dict[int, Step | None] = {}
        self.tokens: RowTokens = (
            HostTokens(most) if device.is_host else DeviceTokens(most, device, self._cache.slot.device)
        )
        self._inputs = {size: (self.tokens.first(size), self._cache.slot[:size, None]) for size in caches}
        self._size: int | None = None  # rows of the next step; None: sequences have joined or left since the last one
        self._guessing = Guessing(variant)
        for row in range(most):
            self._cache.leave(row)

    @property
    def free(self) -> int:
        """Number of free rows."""
        return self.rows.count(None)

    @property
    def used(self) -> int:
        """Number of sequences that a step decodes."""
        return len(self.rows) - self.free

    @property
    def are_under_way(self) -> bool:
        """Whether there is any, with a row or without."""
        return self.used > 0 or bool(self._evicted)

    @property
    def usage(self) -> float:
        """Share of the slots of all rows that hold tokens."""
        return sum(self._cache.lengths) / self._cache.valid.numel()

    def requests(self) -> list[Request]:
        """All requests under way."""
        return [*(evicted.request for evicted in self._evicted), *filter(None, self.rows)]

    def join(self, request: Request, cache: Any, token: int) -> None:
        """Give a sequence a free row.

        Args:
            cache: its keys and values [1, Hk, P, D] per layer.
            token: its next token.
        """
        row = self.rows.index(None)
        self._cache.join(row, cache)
        self._size = None
        self.rows[row] = request
        self.tokens[row] = token

    def evict_for(self, order: float) -> None:
        """If no row is free, take the least urgent sequence's row for a request of this order if it is more urgent.

        Its keys and values are copied. If memory has no room for them, it keeps its row.
        """
        if order == math.inf or self.free or len(self._evicted) == len(self.rows):
            return
        last, row = max((request.terms.order, row) for row, request in enumerate(self.rows) if request is not None)
        if order < last and (request := self.rows[row]) is not None:
            try:
                copied = self._cache.copy_of(row)
            except Exception as error:
                if self.variant.device.failure(error) != "memory":
                    raise
                return
            self._evicted.append(_Evicted(request, copied, self.tokens[row]))
            self._leave(row)
            self.counts["evicted"] += 1

    def resume_before(self, order: float) -> None:
        """Give free rows to evicted sequences that are more urgent than a request of this order."""
        for first in sorted(self._evicted, key=lambda each: each.request.terms.order):
            if not self.free or order < first.request.terms.order:
                return
            self.join(*first)  # may raise; whoever has no row and is not here is lost
            self._evicted.remove(first)

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
        """Fail the requests of all rows, and only then free these, which a dead device refuses."""
        failed = [(row, request) for row, request in enumerate(self.rows) if request is not None]
        for row, request in failed:
            self.rows[row] = None
            self._size = None
            request.fail_with_others(error)
        self._guessing.end()
        for row, _ in failed:
            self._leave(row)

    def step(self) -> None:
        """Decode one token of every sequence that has a row."""
        together = self.used
        try:
            logits = self.logits()
            choices = self.tokens.choose(self.rows[: len(logits)], logits)
        except Exception as error:
            outside.pass_on(error)
            self._fail_rows(error)
            return
        self.together[together] += 1
        grown: list[tuple[int, Request, bool]] = []
        try:
            for row, choice in enumerate(choices):
                if (request := self.rows[row]) is not None and choice is not None:
                    grown.append((row, request, self._grow(row, request, choice)))
        finally:  # all at last: a caller that wakes takes the interpreter's lock at the next operator
            with bells.together():
                for row, request, is_finished in grown:
                    self._hand_on(row, request, is_finished)

    def _hand_on(self, row: int, request: Request, is_finished: bool) -> None:
        """Give a caller its tokens, and the end of its sequence if that is finished."""
        try:
            request.finish() if is_finished else request.hand_on()
        except Exception as error:  # of the caller's streamer: the others wait for their tokens, too
            outside.pass_on(error)
            if self.rows[row] is request:
                self._leave(row)
            request.fail(error)

    def _grow(self, row: int, request: Request, choice: int | Exception) -> bool:
        """Append a token to a row's sequence. Returns whether that is finished; then the row is free."""
        try:
            if isinstance(choice, Exception):
                raise choice
            finished = request.take(choice)
        except Exception as error:  # of the caller's processors or criteria, or NaN: it concerns this row alone
            outside.pass_on(error)
            self._leave(row)
            request.fail(error)
            return False
        if finished:
            self._leave(row)
        return finished

    def logits(self) -> torch.Tensor:
        """Run a step. Returns logits [rows, V] of as many rows as were computed."""
        cache = self._cache
        if self._size is None:
            self._size = self._compact()
        speculation, first = self.variant.speculation, self.rows[0]
        if speculation is not None and first is not None and self.used == 1:
            guessing = self._guessing.of(first, cache.single(0), self._plain)
            logits = guessing(self.tokens.first(1).clone(), cache.slot[:1, None])  # a copy: it may be read steps later
            cache.advance(discarded=speculation.tokens)
        else:
            self._guessing.end()
            logits = self._plain(*self._inputs[self._size])
            cache.advance()
        self.counts["tokens"] += self.used
        return logits

    def _compact(self) -> int:
        """Move sequences so that the next step has few rows. Returns its rows."""
        for source, target in plan.moves([r is not None for r in self.rows], len(self.rows)):
            self._cache.move(source, target)
            self.rows[target], self.rows[source] = self.rows[source], None
            self.tokens[target] = self.tokens[source]
        return plan.size_for([r is not None for r in self.rows], len(self.rows))

    def _plain(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """token, position [rows, 1] -> logits [rows, V], by the step of so many rows."""
        size = len(token)
        if size not in self._steps:
            with preparing(size):
                steps = self.variant.step
                self._steps[size] = None if steps is None else steps.fitting(self._caches[size])
        view, step = self._caches[size], self._steps[size]
        with self.variant.running("decode") as module:
            logits = slot_forward.step(module, token, position, view) if step is None else step(token, position, view)
        self.counts["steps"] += 1
        self.counts["rows"] += size
        return logits

    def _leave(self, row: int) -> None:
        if self.rows[row] is self._guessing.request:
            self._guessing.end()
        self._size = None
        self.tokens[row] = 0
        self._cache.leave(row)
        self.rows[row] = None  # last: a request whose row cannot be freed can still be failed
        if not self.used:
            self._steps.clear()  # they hold weights' addresses, which may change while no sequence is under way
