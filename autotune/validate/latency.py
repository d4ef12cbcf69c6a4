"""Is a candidate faster? Paired, interleaved timing, and a pure verdict on the pairs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..policy import Limits
from ..workload import Bucket
from . import Latency, Speedup, Verdict
from .exam import Progress
from .ratios import EARLY_ALPHA, FINAL_ALPHA, METRICS, Metric, bounds, known, log_ratios, p90_increase, pooled, speedup
from .score import CandidateError, Served, Tokens
from .statistics import Floats, spread
from .timing import Clock, Pair, Timing, request, time_request

if TYPE_CHECKING:
    from ..variant import Variant

__all__ = ["Metric", "Pair", "Timing", "compare", "decide", "label", "noise_floor", "race"]

log = logging.getLogger("autotune")

Arm = Callable[[Bucket, int], Timing]  # times the n-th request of a bucket

# Pairs per bucket after which a clear answer ends the race. Five early looks at 0.5 % and the last at 2.5 % keep the
# chance of a false "faster" within 5 % (Bonferroni).
EARLY_LOOKS = (5, 8, 12, 25, 50)
MAX_POLLUTED = 0.2  # share of pairs that may be dropped
NOISY, TOO_NOISY = (
    0.10,
    0.25,
)  # interquartile range of the pairs' ratios: worth a warning, and too much to conclude anything
STEADY = 1.05  # slowest / fastest of three requests in a row
MAX_WARMUP = 10
WARMUP_SHARE = 0.25  # of the budget


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
        candidate: what wants to replace it.
        buckets: shapes of work; the verdict holds in each of them.
        prompts: token ids, cut and joined to the buckets' lengths.
        objective: the metric that must gain.
        limits: least gain, and what must not get worse.
        noise: A/A half-width from `noise_floor`; None measures it first.
        clock: monotonic seconds.
        max_pairs: pairs per bucket at most.
        budget_s: seconds for all of it, after the very first request of each arm (which may compile).
        seed: of the order in which the arms run.
        progress: called with a step's name and the share done.
    """
    arms = (_arm(reference, prompts, clock), _arm(candidate, prompts, clock))
    try:
        warnings = [
            w for bucket in buckets for w in _warm_up(arms, bucket, clock, budget_s * WARMUP_SHARE / len(buckets))
        ]
        if noise is None:
            noise = noise_floor(
                reference, buckets, prompts, objective=objective, clock=clock, budget_s=budget_s / 4, seed=seed
            )
        return race(
            arms[0],
            arms[1],
            buckets,
            objective=objective,
            limits=limits,
            noise=noise,
            clock=clock,
            max_pairs=max_pairs,
            budget_s=budget_s,
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
    """Pair the arms until the answer is clear, the pairs are used up, or the time is."""
    rng, start = np.random.default_rng(seed), clock()
    pairs: dict[str, list[Pair]] = {label(bucket): [] for bucket in buckets}
    for turn in range(max_pairs):
        for bucket in buckets:
            pairs[label(bucket)].append(_pair(reference, candidate, bucket, turn, swap=bool(rng.random() < 0.5)))
        if progress:
            progress(f"timing pair {turn + 1}", (turn + 1) / max_pairs)
        if turn + 1 in EARLY_LOOKS and turn + 1 < max_pairs:
            found = decide(pairs, objective, limits, noise, early=True, warnings=warnings)
            if found.verdict is not Verdict.INCONCLUSIVE:
                return found
        if clock() - start > budget_s:
            warnings += (f"stopped after {turn + 1} pairs, when the time of {budget_s:.0f} s was used up",)
            # stopped by time, not by the data, so this is the one final look
            break
    return decide(pairs, objective, limits, noise, warnings=warnings)


def decide(
    samples: Mapping[str, Sequence[Pair]],
    objective: Metric,
    limits: Limits,
    noise: float,
    *,
    early: bool = False,
    warnings: tuple[str, ...] = (),
) -> Latency:
    """The verdict on pairs by bucket. Pure.

    Args:
        samples: pairs by bucket label.
        objective: the metric that must gain at least `limits.min_gain`, and twice the noise.
        limits: what must not get worse, in any bucket.
        noise: A/A half-width, a fraction.
        early: more pairs may follow, so only an answer that is clear at `EARLY_ALPHA` counts.
        warnings: noticed while measuring.
    """
    total = sum(map(len, samples.values()))
    polluted = [p.polluted for pairs in samples.values() for p in pairs if p.polluted]
    if polluted:
        warnings += (f"{len(polluted)} of {total} pairs dropped: {'; '.join(sorted(set(polluted)))}",)
    clean = {name: [p for p in pairs if not p.polluted] for name, pairs in samples.items()}
    if min(map(len, clean.values())) < 2:
        return failed(
            "fewer than 2 undisturbed pairs in a bucket: measure again on a quieter machine",
            noise,
            Verdict.INCONCLUSIVE,
        )
    ratios = {name: {m: log_ratios(pairs, m) for m in METRICS} for name, pairs in samples.items()}
    overall = {m: pooled(ratios, m) for m in METRICS}
    rough = max(spread(known(by[objective])) for by in ratios.values())
    if rough > NOISY:
        warnings += (f"the pairs' ratios of {objective} spread by {rough:.0%}",)
    if len(polluted) > MAX_POLLUTED * total:
        verdict, reason = (
            Verdict.INCONCLUSIVE,
            f"{len(polluted)} of {total} pairs were disturbed, over {MAX_POLLUTED:.0%}",
        )
    else:
        verdict, reason = _conclude(ratios, clean, overall[objective], objective, limits, noise, rough, early)
    return Latency(
        verdict=verdict,
        reason=reason,
        ttft=speedup(overall["ttft"]),
        tpot=speedup(overall["tpot"]),
        end_to_end=speedup(overall["end_to_end"]),
        noise=noise,
        buckets={name: {m: speedup(values) for m, values in by.items()} for name, by in ratios.items()},
        reference_s=_raw(samples, "reference"),
        candidate_s=_raw(samples, "candidate"),
        warnings=warnings,
    )


def _conclude(
    ratios: Mapping[str, Mapping[Metric, Floats]],
    clean: Mapping[str, Sequence[Pair]],
    gains: Floats,
    objective: Metric,
    limits: Limits,
    noise: float,
    rough: float,
    early: bool,
) -> tuple[Verdict, str]:
    gate = 1 + max(limits.min_gain, 2 * noise)
    low, high = (math.exp(b) for b in bounds(known(gains), early))
    gain = speedup(gains)
    figures = f"{objective} x{gain.ratio:.3f} [{gain.low:.3f}, {gain.high:.3f}] in {gain.pairs} pairs"
    doubt = ""
    for name, pairs in clean.items():
        for what, point, least, limit in _increases(ratios[name], pairs, limits, early):
            if least > limit:
                return (
                    Verdict.FAIL,
                    f"{what} of {name} changes by {point:+.1%}, over the limit of {limit:.0%} ({figures})",
                )
            if point > limit:
                doubt = f"{what} of {name} changes by {point:+.1%}, perhaps over the limit of {limit:.0%} ({figures})"
    if high < gate:
        return Verdict.FAIL, f"no gain of {gate - 1:.1%}: {figures}"
    if doubt:
        return Verdict.INCONCLUSIVE, doubt
    if low < gate:
        return Verdict.INCONCLUSIVE, f"not clearly a gain of {gate - 1:.1%}: {figures}"
    if rough > TOO_NOISY:
        return Verdict.INCONCLUSIVE, f"too noisy to say: the pairs' ratios spread by {rough:.0%} ({figures})"
    return Verdict.PASS, f"{figures}, clearly a gain of {gate - 1:.1%}"


def _increases(
    ratios: Mapping[Metric, Floats], pairs: Sequence[Pair], limits: Limits, early: bool
) -> list[tuple[str, float, float, float]]:
    """Guards of one bucket: (what, increase, what it surely is at least, limit), as fractions."""
    found: list[tuple[str, float, float, float]] = []
    guarded: tuple[tuple[Metric, float], ...] = (("ttft", limits.max_ttft_increase), ("tpot", limits.max_tpot_increase))
    for metric, limit in guarded:
        values = known(ratios[metric])
        if len(values) >= 2:
            point, high = float(np.median(values)), bounds(values, early)[1]
            found.append((metric, math.expm1(-point), math.expm1(-high), limit))
    point, least = p90_increase(pairs, limits.max_p90_increase, EARLY_ALPHA if early else FINAL_ALPHA)
    found.append(("p90 of end_to_end", point, least, limits.max_p90_increase))
    return found


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
    """What a variant seems to gain on itself: half-width of the 95 % interval of an A/A comparison, as a fraction.

    Args:
        variant: warm already, or the first pair shows it.
        buckets, prompts, objective, clock, seed, progress: as for `compare`.
        pairs: per bucket.
        budget_s: seconds after which no further pair is begun.

    Raises:
        CandidateError: the variant raised.
    """
    return self_noise(
        _arm(variant, prompts, clock),
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
    """`noise_floor` of anything that can be timed."""
    rng, start = np.random.default_rng(seed), clock()
    samples: dict[str, list[Pair]] = {label(bucket): [] for bucket in buckets}
    for turn in range(pairs):
        for bucket in buckets:
            samples[label(bucket)].append(_pair(arm, arm, bucket, turn, swap=bool(rng.random() < 0.5)))
        if progress:
            progress("measuring the machine's noise", (turn + 1) / pairs)
        if turn >= 3 and clock() - start > budget_s:
            break
    values = known(pooled({name: {objective: log_ratios(by, objective)} for name, by in samples.items()}, objective))
    if len(values) < 2:
        return TOO_NOISY
    low, high = bounds(values)
    return math.expm1((high - low) / 2)


def label(bucket: Bucket) -> str:
    """ "b1/p64/n32" """
    return f"b{bucket.batch}/p{bucket.prompt_tokens}/n{bucket.new_tokens}"


def failed(reason: str, noise: float, verdict: Verdict = Verdict.ERROR) -> Latency:
    """A verdict without figures."""
    unknown = Speedup(math.nan, math.nan, math.nan, 0)
    return Latency(verdict, reason, unknown, unknown, unknown, noise)


def _arm(variant: Variant, prompts: Sequence[Tokens], clock: Clock) -> Arm:
    served = Served(variant, pad_token_id=0)  # requests of one bucket are equally long, so nothing is padded
    return lambda bucket, turn: time_request(served, request(bucket, prompts, turn), bucket.new_tokens, clock)


def _pair(reference: Arm, candidate: Arm, bucket: Bucket, turn: int, swap: bool) -> Pair:
    if swap:
        second = candidate(bucket, turn)
        return Pair(reference(bucket, turn), second)
    return Pair(reference(bucket, turn), candidate(bucket, turn))


def _warm_up(arms: Sequence[Arm], bucket: Bucket, clock: Clock, budget_s: float) -> list[str]:
    """Run both arms until three requests in a row take equally long; says so when they never do."""
    restless = []
    for name, arm in zip(("reference", "candidate"), arms, strict=True):
        arm(bucket, 0)  # may compile, so its time is not counted
        start, took = clock(), []
        for turn in range(1, MAX_WARMUP):
            took.append(arm(bucket, turn).end_to_end_s)
            if len(took) >= 3 and max(took[-3:]) <= STEADY * min(took[-3:]):
                break
            if clock() - start > budget_s / len(arms):
                restless.append(f"{name} was not steady in {label(bucket)} after {turn} requests")
                break
        else:
            restless.append(f"{name} was not steady in {label(bucket)} after {MAX_WARMUP} requests")
    return restless


def _raw(samples: Mapping[str, Sequence[Pair]], arm: str) -> dict[str, tuple[float, ...]]:
    """Raw samples by metric, polluted ones included."""
    timings = [getattr(p, arm) for pairs in samples.values() for p in pairs]
    return {m: tuple(getattr(t, f"{m}_s") for t in timings) for m in METRICS}
