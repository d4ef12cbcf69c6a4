"""Made-up machines: two arms whose clock moves only when something runs, and whose speed changes as it likes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from autotune.validate import Latency
from autotune.validate.latency import race, self_noise
from autotune.validate.limits import Limits
from autotune.validate.timing import Timing
from autotune.workload import Bucket

Speed = Callable[[float, np.random.Generator], float]  # seconds since the start, chance -> relative speed

LIMITS = Limits()
B1 = Bucket(1, 64, 32)


class Machine:
    """Two arms on a made-up machine; its clock only moves when something runs.

    Args:
        seed: of everything that is drawn.
        gain: how much faster the candidate is.
        noise: standard deviation of the log of a request's time.
        speed: of the machine, as time goes by.
        ttft_gain: of the first token where it differs from `gain`.
        gain_at: gain by bucket instead of `gain`.
    """

    def __init__(
        self,
        seed: int,
        gain: float = 1.0,
        noise: float = 0.05,
        speed: Speed = lambda now, rng: 1.0,
        ttft_gain: float | None = None,
        gain_at: Callable[[Bucket], float] | None = None,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.now = 0.0
        self.gain = gain
        self.noise = noise
        self.speed = speed
        self.ttft_gain = ttft_gain
        self.gain_at = gain_at

    def clock(self) -> float:
        return self.now

    def arm(self, candidate: bool) -> Callable[[Bucket, int], Timing]:
        """What times a request on one of the two arms."""

        def run(bucket: Bucket, turn: int) -> Timing:
            gain = self.gain_at(bucket) if self.gain_at else self.gain
            scale = math.exp(self.noise * self.rng.normal()) / self.speed(self.now, self.rng)
            ttft = 0.1 * scale / ((self.ttft_gain or gain) if candidate else 1)
            tpot = 0.03 * scale / (gain if candidate else 1)
            self.now += ttft + 31 * tpot
            return Timing(ttft, tpot, ttft + 31 * tpot)

        return run

    def noise_floor(self) -> float:
        return self_noise(self.arm(False), (B1,), "tpot")

    def race(
        self,
        limits: Limits = LIMITS,
        noise: float = 0.0,
        max_pairs: int = 25,
        buckets: tuple[Bucket, ...] = (B1,),
        objective: Any = "tpot",
        **options: Any,
    ) -> Latency:
        """The gate's verdict on this machine's candidate."""
        return race(
            self.arm(False),
            self.arm(True),
            buckets,
            objective=objective,
            limits=limits,
            noise=noise,
            clock=self.clock,
            max_pairs=max_pairs,
            seed=int(self.rng.integers(1 << 30)),
            **{"budget_s": 1e9, **options},
        )


def steady(now: float, rng: np.random.Generator) -> float:
    return 1.0


def drifting(now: float, rng: np.random.Generator) -> float:
    """Ever slower, as a laptop that warms up."""
    return 1 / (1 + now / 60)


def stepping(now: float, rng: np.random.Generator) -> float:
    """Slower from one moment on."""
    return 1.0 if now < 10 else 0.7


def periodic(now: float, rng: np.random.Generator) -> float:
    return 1 + 0.2 * math.sin(now)


def bimodal(now: float, rng: np.random.Generator) -> float:
    """Two clock rates, drawn for each request."""
    return 1.0 if rng.random() < 0.5 else 0.8


def heavy_tailed(now: float, rng: np.random.Generator) -> float:
    """One request in twenty takes ten times as long."""
    return 0.1 if rng.random() < 0.05 else 1.0


def throttled(now: float, rng: np.random.Generator) -> float:
    """A quota that is used up for two seconds of every ten."""
    return 0.4 if now % 10 > 8 else 1.0


MACHINES: dict[str, Speed] = {
    "steady": steady,
    "drift": drifting,
    "step": stepping,
    "periodic": periodic,
    "bimodal": bimodal,
    "heavy tails": heavy_tailed,
    "throttling": throttled,
}
