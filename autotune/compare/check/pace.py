"""Compares how long requests take now with how long they took when a baseline was recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...validate import Verdict
from ...validate.latency import noise_floor
from ...validate.score import Served, Tokens
from ...validate.statistics import median_bounds
from ...validate.timing import Clock, request, time_request
from ...workload import METRICS, Bucket
from .baseline import LatencySamples

if TYPE_CHECKING:
    from ...runtime.variant import Variant

REQUESTS = 16  # timed requests per bucket; the median's 95 % interval is then about +-0.6 standard deviations
WARM_UP = 3  # untimed requests before them
FEWEST = 6  # least undisturbed requests; with fewer a 95 % interval says nothing
ALPHA = 0.0125  # error in each tail of each median, so that the ratio's interval covers 95 % (Bonferroni)
NOISE_PAIRS = 6  # pairs that measure the A/A noise
LONGEST_NOISE_S = 20.0  # most seconds to measure it


@dataclass(frozen=True)
class Slowdown:
    """The ratio of median times, now / then - 1, with a 95 % interval."""

    point: float
    low: float
    high: float


def measure(
    variant: Variant,
    buckets: Sequence[Bucket],
    prompts: Sequence[Tokens],
    *,
    requests: int = REQUESTS,
    clock: Clock = time.perf_counter,
    notify: Callable[[str], None] = lambda step: None,
) -> tuple[LatencySamples, ...]:
    """Time requests of every bucket through the path that serves. Leaves out disturbed requests.

    Raises:
        CandidateError: the variant raised.
    """
    found = []
    for bucket in buckets:
        notify(f"timing {bucket.label}")
        served = Served(variant, pad_token_id=0)  # requests of one bucket are equally long, so nothing is padded
        times = [
            time_request(served, request(bucket, prompts, turn), bucket.new_tokens, clock)
            for turn in range(WARM_UP + requests)
        ]
        clean = [timing for timing in times[WARM_UP:] if not timing.polluted]
        noise = noise_floor(variant, [bucket], prompts, pairs=NOISE_PAIRS, clock=clock, budget_s=LONGEST_NOISE_S)
        samples: dict[str, tuple[float, ...]] = {
            metric: tuple(getattr(t, f"{metric}_s") for t in clean) for metric in METRICS
        }
        found.append(LatencySamples(bucket, samples, noise if math.isfinite(noise) else 1.0))
    return tuple(found)


def slowdown(then_s: Sequence[float], now_s: Sequence[float]) -> Slowdown:
    """How much slower the median became. The samples are not paired, so both medians' intervals count. Pure."""
    then, now = (np.array([s for s in samples if s == s], dtype=np.float64) for samples in (then_s, now_s))
    (then_low, then_high), (now_low, now_high) = median_bounds(then, ALPHA), median_bounds(now, ALPHA)
    point = float(np.median(now) / np.median(then))
    return Slowdown(point - 1, now_low / then_high - 1, now_high / then_low - 1)


def decide(
    then: LatencySamples, now: LatencySamples, metric: str, max_slowdown: float
) -> tuple[Verdict, str, Slowdown | None]:
    """Decide the verdict on one metric of one bucket. Pure.

    The machine's load and temperature were different when the baseline was recorded. So the limit is raised by twice
    the larger of both A/A noises, just as `validate.ratios` requires a gain to exceed twice the noise.
    """
    what = f"{metric} of {then.bucket.label}"
    then_s, now_s = ([s for s in pace.samples_s.get(metric, ()) if s == s] for pace in (then, now))
    if not then_s and not now_s:
        return Verdict.PASS, f"{what} is not defined for one new token", None
    if min(len(then_s), len(now_s)) < FEWEST:
        few = min(len(then_s), len(now_s))
        return Verdict.INCONCLUSIVE, f"{what}: {few} undisturbed requests, need {FEWEST}: use a quieter machine", None
    found = slowdown(then_s, now_s)
    allowance = 2 * max(then.noise, now.noise)
    limit = max_slowdown + allowance
    figures = (
        f"{what} changed by {found.point:+.1%} [{found.low:+.1%}, {found.high:+.1%}],"
        f" limit {max_slowdown:.0%} and {allowance:.1%} for noise"
    )
    if found.low > limit:
        return Verdict.FAIL, figures, found
    if found.point <= max_slowdown and found.high <= limit:  # noise may widen the interval, not move the estimate
        return Verdict.PASS, figures, found
    return Verdict.INCONCLUSIVE, f"{figures}: need more requests, or --against on one machine", found
