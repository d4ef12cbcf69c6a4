"""What is captured of a decode step, in which order, and when: before it serves, in turns with live requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import TYPE_CHECKING, Any

from ...errors import TransformError

if TYPE_CHECKING:
    from ..cache.pool import CachePool
    from ..cache.rows import RowCache
    from ..cache.slots import SlotCache
    from .graphs import GraphSteps

# Largest number of graphs of one step. For a model of 8 billion parameters a graph takes about 10 MB of device memory,
# and the time of 7 steps that are launched operator by operator: warm-ups, the capture, a replay and what it is
# compared with.
MOST_GRAPHS = 64


def lengths(capacity: int, shortest: int) -> tuple[int, ...]:
    """The numbers of slots to read: `shortest`, doubled until all `capacity` slots are read."""
    found = []
    while shortest < capacity:
        found.append(shortest)
        shortest *= 2
    return (*found, capacity)


def buckets(batches: Sequence[int], largest: int = 0) -> tuple[int, ...]:
    """The batch sizes to capture for, ascending: the workload's, rounded up to powers of two.

    Args:
        batches: the workload's batch sizes.
        largest: the largest one to capture for; 0: the workload's.
    """
    largest = largest or max(batches)
    return tuple(sorted({2 ** (batch - 1).bit_length() for batch in (*batches, largest) if batch <= largest}))


def wanted(rows: Sequence[int], lengths: Sequence[int], longest: int, caches: int) -> list[tuple[int, int, int]]:
    """What to capture, in this order: (caches so far, rows, slots to read).

    The workload comes first, then longer contexts, then calls at the same time.

    Args:
        longest: slots that the workload's longest context reads.
        caches: caches that are kept for each number of rows.
    """
    every = product(range(1, caches + 1), rows, lengths)
    return sorted(every, key=lambda each: (each[0], each[2] > longest, *each[1:]))[:MOST_GRAPHS]


def capture_all(
    steps: GraphSteps,
    pool: CachePool,
    prompts: Mapping[int, Any],
    needed: int,
    turn: Callable[[], AbstractContextManager[object]],
) -> None:
    """Capture for the caches that the pool keeps, each length in a turn: no request waits for more than that.

    Args:
        prompts: number of rows -> keys and values of one token, as of `Variant.example`.
        needed: tokens of the workload's longest context.
        turn: a context without requests (`Variant.turn`).

    Raises:
        TransformError: what the workload needs cannot be captured, or a replay gives other logits than the step itself.
    """
    longest = steps.covering(needed)
    for caches, rows, read in wanted(tuple(prompts), steps.lengths, longest, pool.lasting):
        with turn(), pool.keep(prompts[rows], caches) as kept:
            for cache in kept:
                steps.prepare(cache, read)
        if read <= longest and (rows, read) not in steps.shapes and (reason := steps.failed.get((rows, read))):
            raise TransformError(f"{steps.subject} cannot be captured: {reason}")


def capture_rows(
    steps: GraphSteps,
    caches: Mapping[int, RowCache],
    prompt: Any,
    needed: int,
    turn: Callable[[], AbstractContextManager[object]],
) -> None:
    """Capture for rows that are independent, in turns as `capture_all`.

    Args:
        caches: number of rows -> cache for a step of these rows; all are views of the one with the most. They are left
            with a sequence in every row.
        prompt: keys and values of one token, as of `Variant.example`.
        needed: tokens of the workload's longest context.

    Raises:
        TransformError: what the workload needs cannot be captured, or a replay gives other logits than the step itself.
    """
    caches[max(caches)].begin_all(prompt)
    steps.look(caches[max(caches)])  # before the compilations, which take minutes
    if steps.inner is not None:
        for cache, read in product(caches.values(), steps.lengths):
            steps.inner.prepare(cache.first(read), steps.tokens)
    longest = steps.covering(needed)
    for _, rows, read in wanted(tuple(caches), steps.lengths, longest, 1):
        with turn():
            steps.prepare(caches[rows], read)
        if read <= longest and read not in steps.reads(caches[rows]):
            reason = steps.failed.get((rows, read), "no capture is tried after one that failed")
            raise TransformError(f"the decode step of {rows} rows cannot be captured: {reason}")


def capture_checks(
    steps: GraphSteps, row: SlotCache, needed: int, turn: Callable[[], AbstractContextManager[object]]
) -> None:
    """Capture a step of several tokens for one of several independent rows, in turns as `capture_all`.

    Args:
        row: filled with one token.
        needed: tokens of the workload's longest context.

    Raises:
        TransformError: what the workload needs cannot be captured, or a replay gives other logits than the step itself.
    """
    longest = steps.covering(needed)
    for read in steps.lengths:
        with turn():
            steps.prepare(row, read)
        if read <= longest and read not in steps.reads(row):
            reason = steps.failed.get((1, read), "no capture is tried after one that failed")
            raise TransformError(f"the step that checks guesses cannot be captured for a row: {reason}")
