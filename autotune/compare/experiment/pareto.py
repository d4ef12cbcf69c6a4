"""Finds the arms that no other arm beats in speed, quality and memory together. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .outcomes import Outcomes

LEAST_KLD = 1e-5  # nats; smaller values are drawn here, because zero has no logarithm


@dataclass(frozen=True)
class Point:
    """An arm by its point estimates.

    Args:
        name: name of the arm.
        speedup: speed-up of the objective over the control; the control's is 1.
        mean_kld: mean KL divergence from the control's model, nats; infinite if it was not or cannot be compared.
        stored_bytes: bytes of its weights.
    """

    name: str
    speedup: float
    mean_kld: float
    stored_bytes: float


def points(result: Outcomes) -> tuple[Point, ...]:
    """The arms that were measured, the control first."""
    found = []
    for k, outcome in enumerate(result.outcomes):
        speedup = 1.0 if k == 0 else getattr(outcome.latency, result.objective).ratio if outcome.latency else math.nan
        kld = outcome.quality.mean_kld if outcome.quality else math.nan if k else 0.0
        if math.isfinite(speedup) and math.isfinite(outcome.stored_bytes):
            found.append(Point(outcome.name, speedup, math.inf if math.isnan(kld) else kld, outcome.stored_bytes))
    return tuple(found)


def front(given: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other dominates, the fastest first; equal points stay together."""
    return tuple(sorted((p for p in given if not any(dominates(q, p) for q in given)), key=lambda p: -p.speedup))


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is not worse than `other` in any of the three, and better in at least one."""
    mine = (-one.speedup, one.mean_kld, one.stored_bytes)
    theirs = (-other.speedup, other.mean_kld, other.stored_bytes)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def plotted(given: Sequence[Point], width: int = 64, height: int = 12) -> str:
    """Plot speed against quality as text: one digit per point, "1" for the first. Up is faster, left is closer.

    "*" marks points at the same place.
    """
    shown = [(k, p) for k, p in enumerate(given, 1) if math.isfinite(p.mean_kld)]
    if not shown:
        return ""
    across = [math.log10(max(p.mean_kld, LEAST_KLD)) for _, p in shown]
    up = [p.speedup for _, p in shown]
    left, right = math.floor(min(across)), max(math.ceil(max(across)), math.floor(min(across)) + 1)
    low, high = 0.9 * min(up), 1.05 * max(up)
    cells = [[" "] * width for _ in range(height)]
    for (k, _), x, y in zip(shown, across, up, strict=True):
        row = height - 1 - round((height - 1) * (y - low) / (high - low))
        column = round((width - 1) * (x - left) / (right - left))
        cells[row][column] = "*" if cells[row][column] != " " else str(k % 10)
    scale = [f"{high - (high - low) * row / (height - 1):5.2f}x |" for row in range(height)]
    lines = [f"{mark}{''.join(row).rstrip()}" for mark, row in zip(scale, cells, strict=True)]
    ends = f"{f'{10.0**left:.0e} nat':<{width - 10}}{f'{10.0**right:.0e} nat':>10}"
    return "\n".join((*lines, f"       +{'-' * width}", f"        {ends}")) + "\n"
