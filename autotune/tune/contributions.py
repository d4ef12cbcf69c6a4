"""Measures what each transform of a plan contributes: compares the plan with the plan without that transform."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..errors import DeviceError, TransformError
from ..machine import outside
from ..runtime.variant import Transform, Variant
from ..transforms.linears import reusing
from ..validate import Latency, Verdict
from ..workload import Target

log = logging.getLogger("autotune")


class ContributionBench(Protocol):
    """The parts of a bench that are needed to measure contributions."""

    original: Variant
    notify: Callable[[str], None]

    @property
    def deadline(self) -> float: ...

    @property
    def race_s(self) -> float: ...

    def compare_briefly(self, reference: Variant, candidate: Variant, target: Target) -> Latency: ...

    def describe_error(self, error: Exception) -> str: ...

    def free_memory(self) -> None: ...


@dataclass(frozen=True)
class Contribution:
    """What one transform contributes.

    Args:
        transform: the transform that was left out.
        target: what it should make faster: its phase, or "both".
        latency: the plan compared with the plan without it; None if that was not measured.
        reason: why it was not measured; empty if it was.
    """

    transform: Transform
    target: Target
    latency: Latency | None
    reason: str = ""


def measure(
    winner: Variant, bench: ContributionBench, clock: Callable[[], float] = time.monotonic
) -> tuple[Contribution, ...]:
    """Measure a plan of two or more transforms without each of them, as far as the budget allows.

    Raises:
        DeviceError: the device is dead.
    """
    found: list[Contribution] = []
    took_s = bench.race_s  # the longest measurement so far
    with reusing(winner):
        for transform in winner.transforms if len(winner.transforms) > 1 else ():
            start = clock()
            if start + took_s >= bench.deadline:
                found.append(Contribution(transform, transform.phase, None, "the budget had no time for it"))
                continue
            bench.notify(f"measuring what {transform} contributes")
            found.append(_contribution(transform, winner, bench))
            bench.free_memory()
            took_s = max(took_s, clock() - start)
    return tuple(found)


def _contribution(transform: Transform, winner: Variant, bench: ContributionBench) -> Contribution:
    others = tuple(other for other in winner.transforms if other is not transform)
    try:
        latency = bench.compare_briefly(bench.original.with_transforms(others), winner, transform.phase)
    except TransformError as error:
        return Contribution(transform, transform.phase, None, f"the others need it: {error}")
    except DeviceError:
        raise
    except Exception as error:  # a transform is foreign code
        outside.pass_on(error)
        log.debug("the plan without %s", transform, exc_info=True)
        return Contribution(transform, transform.phase, None, bench.describe_error(error))
    if latency.verdict is Verdict.ERROR:
        return Contribution(transform, transform.phase, None, latency.reason)
    return Contribution(transform, transform.phase, latency)
