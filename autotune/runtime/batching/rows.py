"""Which rows sequences take, and how many rows a step computes. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def sizes(most: int) -> tuple[int, ...]:
    """Numbers of rows for which steps are prepared: powers of two, and `most` itself."""
    found = [1]
    while 2 * found[-1] < most:
        found.append(2 * found[-1])
    return tuple(dict.fromkeys([*found, most]))


def size_for(used: Sequence[bool], most: int) -> int:
    """Rows that a step has to compute: the smallest prepared number that holds every row in use.

    Args:
        used: for each row, whether it has a sequence.
    """
    needed = max((row + 1 for row, taken in enumerate(used) if taken), default=1)
    return next(size for size in sizes(most) if size >= needed)


def moves(used: Sequence[bool], most: int) -> list[tuple[int, int]]:
    """Moves (from, to) after which a step computes as few rows as possible; none if no smaller step would do.

    Moving copies a sequence's keys and values, so rows are moved only if the next step becomes smaller.
    """
    taken = [row for row, is_taken in enumerate(used) if is_taken]
    fitting = next(size for size in sizes(most) if size >= max(len(taken), 1))
    if size_for(used, most) == fitting:
        return []
    outside = [row for row in taken if row >= fitting]
    free = [row for row in range(fitting) if not used[row]]
    return list(zip(outside, free, strict=False))
