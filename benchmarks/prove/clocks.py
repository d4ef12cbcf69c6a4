"""The latency gate on made-up machines: how often it commits nothing for something, and sees something there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autotune.validate import Verdict
from autotune.validate.limits import Limits
from benchmarks.prove.machines import MACHINES, Machine
from benchmarks.prove.rates import Rate

FALSE_COMMITS = 0.01  # at most, of the original raced against itself
FAMILY_COMMITS = 0.05  # at most, of 30 null candidates with the winner confirmed
POWER = 0.80  # at least, for a change of 5 % at 5 % noise within 100 pairs
FAMILY = 30
BIAS = 0.02  # of the median estimate of a gain, relative


@dataclass(frozen=True)
class Sizes:
    """How many races each figure comes from."""

    seeds: int = 500
    families: int = 200
    power: int = 300
    bias: int = 100


QUICK = Sizes(seeds=60, families=6, power=40, bias=20)


def false_commits(machine: str, seeds: Sequence[int]) -> list[str]:
    """Verdicts on the original raced against itself, as a search does it: noise first."""
    found = []
    for seed in seeds:
        made = Machine(seed, speed=MACHINES[machine])
        found.append(str(made.race(noise=made.noise_floor()).verdict))
    return found


def family_commits(family: int) -> bool:
    """Whether any of 30 null candidates passes and is then confirmed with fresh timing."""
    start = 1000 * family + 500_000
    winners = [k for k in range(FAMILY) if _passes(start + k)]
    return any(_passes(10**7 + start + k) for k in winners)


def _passes(seed: int) -> bool:
    machine = Machine(seed)
    return machine.race(noise=machine.noise_floor()).verdict is Verdict.PASS


def seen(gain: float, seeds: Sequence[int]) -> list[str]:
    """Verdicts on a real change: 5 % of noise, at most 100 pairs, no least gain beyond none at all."""
    limits = Limits(min_gain=0.0)
    return [str(Machine(seed, gain=gain).race(limits=limits, max_pairs=100).verdict) for seed in seeds]


def estimates(machine: str, gain: float, seeds: Sequence[int]) -> list[float]:
    """Estimated gains."""
    return [Machine(seed, gain=gain, speed=MACHINES[machine]).race().tpot.ratio for seed in seeds]


def chunks(count: int, size: int = 50) -> list[range]:
    return [range(k, min(k + size, count)) for k in range(0, count, size)]


def summarise_commits(verdicts: Sequence[str]) -> Rate:
    return Rate(verdicts.count(str(Verdict.PASS)), len(verdicts))


def bias(found: Sequence[float], gain: float) -> float:
    """Relative error of the median estimate."""
    return float(np.median(found)) / gain - 1
