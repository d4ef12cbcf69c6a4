"""A decode step recorded once as a program of C++ instructions and run by one team of threads: no Python, no dispatch.

    given -> trace -> fusions -> lower -> layout -> program -> kernels/program.cpp
                                   |-> kept

`given` runs the modules that cannot be part of a program. `trace` records the step's operators on fake tensors.
`fusions` finds those that one instruction computes together, and `lower` turns all into instructions over named
memory. `layout` decides where values are stored and when threads meet. The operator `run_program` runs the words that
result. `kept` writes and reads what was lowered, so that a later process need not record it. `recorded` puts these
together for a token of every row, and for several tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ....machine import forking
from ...cache.rows import RowCache
from ...cache.slots import SlotCache
from ..step import DecodeSteps, Step
from .kept import KEPT
from .program import Program
from .recorded import RecordedStep, TokensOfOne

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Program", "StepPrograms"]


def _key(cache: SlotCache) -> tuple[int, int, int]:
    return *cache.shape, cache.slot.shape[0]


class StepPrograms(DecodeSteps):
    """Decode steps of one module as programs, by the shape of the cache."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self._steps: dict[tuple[int, int, int], RecordedStep] = {}  # (rows, slots, 1 or a write slot for each row)
        self._makers: dict[tuple[int, int], Callable[[], RowCache]] = {}  # (slots, tokens) -> makes an empty cache
        self._several: dict[tuple[int, int], TokensOfOne] = {}  # the same
        self._lock = forking.lock()
        self._kept = KEPT.get()

    def prepare(self, cache: SlotCache) -> None:
        """Record the step for this cache's shape, unless it is recorded already.

        Raises:
            TransformError: the step cannot be recorded as a program.
        """
        with self._lock:
            if (key := _key(cache)) not in self._steps:
                self._steps[key] = RecordedStep(self.module, cache, self._kept)

    def prepare_several(self, make: Callable[[], RowCache]) -> None:
        """Record the step of several tokens of one sequence.

        Args:
            make: makes an empty cache with a row for each token.

        Raises:
            TransformError: the step cannot be recorded as a program.
        """
        cache = make()
        rows, slots = cache.shape
        with self._lock:
            self._makers[slots, rows] = make
            self._several[slots, rows] = TokensOfOne(self.module, cache, self._kept)

    def several(self, tokens: int, cache: SlotCache) -> TokensOfOne | None:
        """The smallest prepared step of at least `tokens` tokens of the cache's sequence, or None if none fits."""
        rows, slots = cache.shape
        fits = [n for s, n in self._makers if s == slots and n >= tokens and cache.length + n <= slots]
        if not fits or rows > 1:
            return None
        key = slots, min(fits)
        with self._lock:
            if key not in self._several:
                self._several[key] = TokensOfOne(self.module, self._makers[key](), self._kept)
            return self._several[key]

    def forget(self) -> None:
        """Drop programs, because weights have moved and programs hold addresses. They are recorded again later."""
        with self._lock:
            self._steps.clear()
            self._several.clear()
            self._kept = None  # values that were folded may be others

    @property
    def programs(self) -> list[Program]:
        """Every program that was made."""
        with self._lock:
            return [step.program for step in (*self._steps.values(), *self._several.values())]

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(batch, slots) of every step for a batch. Independent rows, which have slots of their own, are none."""
        with self._lock:
            return tuple((rows, slots) for rows, slots, written in self._steps if written == 1)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Within this context, every run records how long each instruction took; see `Program.times`."""
        with self._lock:
            programs = [step.program for step in self._steps.values()]
        for program in programs:
            program.timed = True
        try:
            yield
        finally:
            for program in programs:
                program.timed = False

    def program(self, batch: int) -> Program | None:
        """The program for a batch of `batch` sequences, or None if it was not recorded."""
        with self._lock:
            return next((step.program for (rows, *_), step in self._steps.items() if rows == batch), None)

    def fitting(self, cache: SlotCache) -> Step:
        """The step for this cache's shape. The first use of a shape records it, which takes a second or two."""
        self.prepare(cache)
        return self._steps[_key(cache)].over(cache)
