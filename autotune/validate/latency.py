"""Measure whether a candidate is faster, by paired, interleaved timing. `ratios` gives the verdict on the pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..workload import Bucket, Metric
from . import Latency, Verdict
from .exam import Progress
from .limits import Limits
from .ratios import FEWEST_PAIRS, bounds, decide, failed, known, leads, log_ratios, pooled
from .score import CandidateError, Served, Tokens
from .timing import TIMED_TOKENS, Clock, Pair, Timing, request, time_request

if TYPE_CHECKING:
    from ..runtime.variant import Variant

__all__ = ["Metric", "Pair", "Timing", "compare", "decide", "noise_floor", "race", "timed", "warm_up"]

Arm = Callable[[Bucket, int], Timing]  # times the n-th request of a bucket

# Pairs per bucket after which a clear answer ends the race. Five early looks at 0.5 % and the last at 2.5 % keep the
# chance of a false "faster" within 5 % (Bonferroni).
EARLY_LOOKS = (FEWEST_PAIRS, 8, 12, 25, 50)
STEADY = 1.05  # slowest / fastest of three requests in a row that counts as steady; twice the noise if that is more
STEADY_REQUESTS, MAX_WARMUP = 3, 10  # requests in a row that are steady; most requests of an arm's warm-up
WARMUP_TOKENS = 8  # most tokens of each of them except the first, and the fewest that a longer request is timed over
WARMUP_SHARE = 0.15  # share of the time budget that warm-up may use


def compare(
    reference: Variant,
    candidate: Variant,
    buckets: Sequence[Bucket],
    prompts: Sequence[Tokens],
    *,
    objective: Metric,
    limits: Limits,
    noise: float | None,
    clock: Clock = time.perf_counter,
    max_pairs: int = 25,
    budget_s: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Latency:
    """Time a candidate against a reference through the path that serves.

    Args:
        reference: the variant accepted so far, or the original's.
        candidate: the variant that may replace it.
        buckets: shapes of work; the verdict holds in each of them.
        prompts: token ids, cut and joined to the buckets' lengths.
        objective: the metric that must gain.
        limits: least gain, and what must not get worse.
        noise: A/A half-width from `noise_floor`; None measures it first.
        clock: monotonic seconds.
        max_pairs: pairs per bucket at most.
        budget_s: seconds after which no further pair is begun, warm-up included. Requests are timed over so few tokens
            that the fewest pairs fit in. If the candidate is ahead, pairs go on until there are enough to call it
            faster.
        seed: of the order in which the arms run.
        progress: called with a step's name and the share done.
    """
    arms = {"reference": timed(reference, prompts, clock), "candidate": timed(candidate, prompts, clock)}
    start = clock()
    try:
        steady, share_s = max(STEADY, 1 + 2 * (noise or 0.0)), budget_s * WARMUP_SHARE / len(buckets)
        warm = [warm_up(arms, bucket, clock, steady, share_s) for bucket in buckets]
        warnings = [warning for each in warm for warning in each.restless]
        left_s = max(0.0, budget_s - (clock() - start))
        tokens = affordable([timing for each in warm for timing in each.latest], left_s)
        arms = {name: timed(v, prompts, clock, tokens) for name, v in zip(arms, (reference, candidate), strict=True)}
        if noise is None:
            noise = noise_floor(
                reference, buckets, prompts, objective=objective, clock=clock, budget_s=left_s / 4, seed=seed
            )
        return race(
            arms["reference"],
            arms["candidate"],
            buckets,
            objective=objective,
            limits=limits,
            noise=noise,
            clock=clock,
            max_pairs=max_pairs,
            budget_s=left_s,
            seed=seed,
            progress=progress,
            warnings=tuple(warnings),
        )
    except CandidateError as error:
        return failed(str(error), noise or 0.0)


def race(
    reference: Arm,
    candidate: Arm,
    buckets: Sequence[Bucket],
    *,
    objective: Metric,
    limits: Limits,
    noise: float,
    clock: Clock = time.perf_counter,
    max_pairs: int = 25,
    budget_s: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
    warnings: tuple[str, ...] = (),
) -> Latency:
    """Time the arms in pairs until the answer is clear, or the pairs or the time are used up."""
    rng, start = np.random.default_rng(seed), clock()
    pairs: dict[str, list[Pair]] = {bucket.label: [] for bucket in buckets}
    for turn in range(max_pairs):
        for bucket in buckets:
            pairs[bucket.label].append(_pair(reference, candidate, bucket, turn, swap=bool(rng.random() < 0.5)))
        if progress:
            progress(f"timing pair {turn + 1}", (turn + 1) / max_pairs)
        if turn + 1 in EARLY_LOOKS and turn + 1 < max_pairs:
            found = decide(pairs, objective, limits, noise, early=True, warnings=warnings)
            if found.verdict is not Verdict.INCONCLUSIVE:
                return found
        if clock() - start > budget_s and (turn + 1 >= FEWEST_PAIRS or not leads(pairs, objective)):
            warnings += (f"stopped after {turn + 1} pairs, when the time of {budget_s:.0f} s was used up",)
            # the clock ended the race, not the data, so what follows is the one final look
            break
    return decide(pairs, objective, limits, noise, warnings=warnings)


def noise_floor(
    variant: Variant,
    buckets: Sequence[Bucket],
    prompts: Sequence[Tokens],
    *,
    objective: Metric = "end_to_end",
    pairs: int = 8,
    clock: Clock = time.perf_counter,
    budget_s: float = 20.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Measure how much a variant seems to gain on itself: half-width of the 95 % interval of an A/A test, a fraction.

    It is infinite if fewer than two pairs were undisturbed.

    Args:
        variant: should be warm; otherwise its first pair includes the warm-up.
        buckets, prompts, objective, clock, seed, progress: as for `compare`.
        pairs: per bucket.
        budget_s: seconds after which no further pair is begun.

    Raises:
        MeasurementError: the variant raised.
    """
    return self_noise(
        timed(variant, prompts, clock),
        buckets,
        objective,
        pairs,
        clock=clock,
        budget_s=budget_s,
        seed=seed,
        progress=progress,
    )


def self_noise(
    arm: Arm,
    buckets: Sequence[Bucket],
    objective: Metric,
    pairs: int = 8,
    *,
    clock: Clock = time.perf_counter,
    budget_s: float = math.inf,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Do what `noise_floor` does, for any arm."""
    rng, start = np.random.default_rng(seed), clock()
    samples: dict[str, list[Pair]] = {bucket.label: [] for bucket in buckets}
    for turn in range(pairs):
        for bucket in buckets:
            samples[bucket.label].append(_pair(arm, arm, bucket, turn, swap=bool(rng.random() < 0.5)))
        if progress:
            progress("measuring the machine's noise", (turn + 1) / pairs)
        if turn >= 3 and clock() - start > budget_s:
            break
    values = known(pooled({name: {objective: log_ratios(by, objective)} for name, by in samples.items()}, objective))
    if len(values) < 2:
        return math.inf  # too few undisturbed pairs
    low, high = bounds(values)
    return math.expm1((high - low) / 2)


def timed(
    variant: Variant, prompts: Sequence[Tokens], clock: Clock = time.perf_counter, tokens: int = TIMED_TOKENS
) -> Arm:
    """Return an arm that times a variant through the path that serves. It raises CandidateError if the variant does.

    Args:
        tokens: most tokens of a timed request.
    """
    served = Served(variant, pad_token_id=0)  # requests of one bucket are equally long, so nothing is padded
    return lambda bucket, turn: time_request(served, request(bucket, prompts, turn), bucket.new_tokens, clock, tokens)


def affordable(each: Sequence[Timing], budget_s: float) -> int:
    """Return how many tokens of each of these requests can be timed `FEWEST_PAIRS` times in `budget_s`. Pure."""
    token_s = sum(timing.tpot_s for timing in each if math.isfinite(timing.tpot_s))
    room_s = budget_s / FEWEST_PAIRS - sum(timing.ttft_s for timing in each)
    return min(TIMED_TOKENS, max(WARMUP_TOKENS, 1 + int(room_s / token_s))) if token_s else TIMED_TOKENS


def _pair(reference: Arm, candidate: Arm, bucket: Bucket, turn: int, swap: bool) -> Pair:
    if swap:
        second = candidate(bucket, turn)
        return Pair(reference(bucket, turn), second)
    return Pair(reference(bucket, turn), candidate(bucket, turn))


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up showed.

    Args:
        restless: a warning for each arm that never became steady.
        latest: each arm's latest request.
    """

    restless: list[str]
    latest: list[Timing]


def warm_up(arms: Mapping[str, Arm], bucket: Bucket, clock: Clock, steady: float, budget_s: float) -> WarmUp:
    """Run each arm until three requests in a row take equally long, within `steady`.

    The first request of an arm is whole; the others have short answers.
    """
    restless, latest = list[str](), list[Timing]()
    short = replace(bucket, new_tokens=min(bucket.new_tokens, WARMUP_TOKENS))
    for name, arm in arms.items():
        arm(bucket, 0)  # it may compile, so its time is not counted
        start, took = clock(), list[float]()
        for turn in range(1, MAX_WARMUP):
            timing = arm(short, turn)
            took.append(timing.end_to_end_s)
            last = took[-STEADY_REQUESTS:]
            if len(last) == STEADY_REQUESTS and max(last) <= steady * min(last):
                break
            if clock() - start > budget_s / len(arms):
                restless.append(f"{name} was not steady in {bucket.label} after {turn} requests")
                break
        else:
            restless.append(f"{name} was not steady in {bucket.label} after {MAX_WARMUP} requests")
        latest.append(timing)
    return WarmUp(restless, latest)
