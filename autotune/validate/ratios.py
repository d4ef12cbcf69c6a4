"""Ratios of paired times: the speed-up, its confidence interval and the verdict. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..workload import METRICS, Metric
from . import BucketTimes, Latency, Speedup, Verdict
from .limits import Limits
from .statistics import Floats, median_bounds, spread
from .timing import Pair, Timing

EARLY_ALPHA = 0.005  # error probability in each tail, at each early look
FINAL_ALPHA = 0.025  # error probability in each tail, at the final look
# (number of values, 99.5 % quantile of Student's t); an entry holds up to the number of the next entry
STUDENT = ((2, 63.66), (3, 9.925), (4, 5.841), (5, 4.604), (8, 3.499), (12, 3.106), (25, 2.797), (50, 2.680))

# Pairs needed for "faster". One of two equal arms wins five pairs of five once in 2^5 = 32 races. Its gain also has to
# exceed the minimum and the noise; `make prove` measures how often an equal one is committed.
FEWEST_PAIRS = 5
MAX_POLLUTED = 0.2  # share of pairs that may be dropped; above it, the verdict is inconclusive
NOISY = 0.10  # interquartile range of the pairs' log ratios above which a warning is given
TOO_NOISY = 0.25  # interquartile range of the pairs' log ratios above which no small gain passes
# A gain is not small if its lower bound, in log units, is at least so many times that range. On a machine where another
# process takes a core, ratios between 6.5 and 11 spread by 0.44, and ratios between 2.7 and 7.8 by 0.55: too noisy to
# tell 1.1x from 1x, but surely 2.7x. If normal noise alone spread so, a pair would be beyond that bound once in eleven
# times, and all of five pairs once in more than 100,000.
CLEAR_OF_NOISE = 1.0


def decide(
    samples: Mapping[str, Sequence[Pair]],
    objective: Metric,
    limits: Limits,
    noise: float,
    *,
    early: bool = False,
    warnings: tuple[str, ...] = (),
) -> Latency:
    """Give the verdict on pairs by bucket. Pure.

    Args:
        samples: pairs by bucket label.
        objective: the metric that must gain at least `limits.min_gain`, and twice the noise.
        limits: what must not get worse, in any bucket.
        noise: A/A half-width, a fraction.
        early: whether more pairs may follow, so that only an answer that is clear at `EARLY_ALPHA` counts.
        warnings: those collected during the measurement.
    """
    total = sum(map(len, samples.values()))
    polluted = [p.polluted for pairs in samples.values() for p in pairs if p.polluted]
    if polluted:
        warnings += (f"{len(polluted)} of {total} pairs dropped: {'; '.join(sorted(set(polluted)))}",)
    clean = {name: [p for p in pairs if not p.polluted] for name, pairs in samples.items()}
    if not math.isfinite(noise):
        reason = "this machine's noise is not known, as too many requests were disturbed: measure again"
        return failed(f"{reason} on a quieter machine", noise, Verdict.INCONCLUSIVE)
    if (fewest := min(map(len, clean.values()))) < 2:
        reason = "fewer than 2 undisturbed pairs in a bucket: measure again on a quieter machine"
        return failed(reason, noise, Verdict.INCONCLUSIVE)
    ratios = {name: {m: log_ratios(pairs, m) for m in METRICS} for name, pairs in samples.items()}
    if any(len(known(by[objective])) < 2 for by in ratios.values()):
        reason = f"{objective} is not known: requests of one new token have no time between tokens"
        return failed(reason, noise, Verdict.INCONCLUSIVE)
    overall = {m: pooled(ratios, m) for m in METRICS}
    rough = max(spread(known(by[objective])) for by in ratios.values())
    if rough > NOISY:
        warnings += (f"the pairs' ratios of {objective} spread by {rough:.0%}",)
    if len(polluted) > MAX_POLLUTED * total:
        verdict, drowned = Verdict.INCONCLUSIVE, False
        reason = f"{len(polluted)} of {total} pairs were disturbed, over {MAX_POLLUTED:.0%}"
    else:
        verdict, reason, drowned = _conclude(ratios, clean, overall[objective], objective, limits, noise, rough, early)
        if verdict is Verdict.PASS and fewest < FEWEST_PAIRS:
            verdict, reason = (
                Verdict.INCONCLUSIVE,
                f"{fewest} undisturbed pairs are too few, need {FEWEST_PAIRS}: {reason}",
            )
    return Latency(
        verdict=verdict,
        reason=reason,
        ttft=speedup(overall["ttft"]),
        tpot=speedup(overall["tpot"]),
        end_to_end=speedup(overall["end_to_end"]),
        noise=noise,
        buckets={
            name: BucketTimes(
                {m: speedup(values) for m, values in ratios[name].items()},
                _raw([pair.reference for pair in pairs]),
                _raw([pair.candidate for pair in pairs]),
            )
            for name, pairs in samples.items()
        },
        warnings=warnings,
        drowned=drowned,
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
) -> tuple[Verdict, str, bool]:
    """Return the verdict, its reason, and whether it fails only because of this machine's noise."""
    must_gain = limits.min_gain >= 0
    gate = 1 + (max(limits.min_gain, 2 * noise) if must_gain else limits.min_gain)
    low, high = (math.exp(b) for b in bounds(known(gains), early))
    gain = speedup(gains)
    figures = f"{objective} x{gain.ratio:.3f} [{gain.low:.3f}, {gain.high:.3f}] in {gain.pairs} pairs"
    doubt = ""
    for name, pairs in clean.items():
        for what, point, least, limit in _increases(ratios[name], pairs, limits, early):
            if least > limit:
                reason = f"{what} of {name} changes by {point:+.1%}, over the limit of {limit:.0%} ({figures})"
                return Verdict.FAIL, reason, False
            if point > limit:
                doubt = f"{what} of {name} changes by {point:+.1%}, perhaps over the limit of {limit:.0%} ({figures})"
    if high < gate:
        why = "twice the machine's own noise" if 2 * noise > limits.min_gain else "the least gain"
        return Verdict.FAIL, f"no gain of {gate - 1:.1%}, {why}: {figures}", must_gain and high >= 1 + limits.min_gain
    if doubt:
        return Verdict.INCONCLUSIVE, doubt, False
    if low < gate:
        return Verdict.INCONCLUSIVE, f"not clearly a gain of {gate - 1:.1%}: {figures}", False
    if rough > TOO_NOISY and (low <= 1 or math.log(low) < CLEAR_OF_NOISE * rough):
        return Verdict.INCONCLUSIVE, f"too noisy to say: the pairs' ratios spread by {rough:.0%} ({figures})", False
    passed = f"clearly a gain of {gate - 1:.1%}" if must_gain else "within the limits"
    return Verdict.PASS, f"{figures}, {passed}", False


def _increases(
    ratios: Mapping[Metric, Floats], pairs: Sequence[Pair], limits: Limits, early: bool
) -> list[tuple[str, float, float, float]]:
    """Return the guards of one bucket: (name, increase, its lower bound, limit), as fractions."""
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


def p90_increase(pairs: Sequence[Pair], limit: float, alpha: float) -> tuple[float, float]:
    """Return the increase of the 90th percentile of end-to-end time, and its lower bound, as fractions.

    The bound is bootstrapped (whole pairs are drawn) only if the increase is over `limit`; otherwise both are equal.
    """
    times = np.array([[p.reference.end_to_end_s, p.candidate.end_to_end_s] for p in pairs])  # [N, 2]
    reference, candidate = np.quantile(times, 0.9, axis=0)
    point = float(candidate / reference - 1)
    if point <= limit:
        return point, point
    drawn = times[np.random.default_rng(0).integers(0, len(times), size=(1000, len(times)))]  # [R, N, 2]
    p90 = np.quantile(drawn, 0.9, axis=1)  # [R, 2]
    return point, float(np.quantile(p90[:, 1] / p90[:, 0] - 1, alpha))


def bounds(values: Floats, early: bool = False) -> tuple[float, float]:
    """Return bounds of the median by bootstrap; at an early look, the wider of these and Student's t bounds.

    A bootstrap of few values alone gives intervals that are too narrow.
    """
    alpha = EARLY_ALPHA if early else FINAL_ALPHA
    low, high = median_bounds(values, alpha)
    if early:
        t = [quantile for count, quantile in STUDENT if count <= len(values)][-1]
        half = t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        low, high = min(low, float(np.mean(values)) - half), max(high, float(np.mean(values)) + half)
    return low, high


def log_ratios(pairs: Sequence[Pair], metric: Metric) -> Floats:
    """Return log(reference / candidate) [N] of one bucket's pairs; NaN if a pair is polluted or has no such metric."""
    both = np.array([[getattr(p.reference, f"{metric}_s"), getattr(p.candidate, f"{metric}_s")] for p in pairs])
    both[[bool(p.polluted) for p in pairs]] = np.nan
    ratios: Floats = np.log(both[:, 0]) - np.log(both[:, 1])
    return ratios


def pooled(ratios: Mapping[str, Mapping[Metric, Floats]], metric: Metric) -> Floats:
    """Return log ratios [N] over all buckets: each turn's mean, or the worst bucket's if the buckets differ in sign."""
    by = [values[metric] for values in ratios.values() if len(known(values[metric]))]
    if not by:
        return np.full(1, np.nan)
    medians = [float(np.median(known(values))) for values in by]
    if min(medians) < 0 < max(medians):
        return by[int(np.argmin(medians))]
    turns = np.stack([values[: min(map(len, by))] for values in by])  # [buckets, N]
    there = ~np.isnan(turns)
    count = there.sum(axis=0)
    means: Floats = np.where(there, turns, 0.0).sum(axis=0)[count > 0] / count[count > 0]
    return means


def own_noise(found: Latency, metric: Metric) -> float:
    """Return an A/A half-width from a race: each of the reference's requests against the one before it.

    It is larger than the result of `latency.noise_floor`, because the requests are few and a candidate's request runs
    between each two of them.
    """
    times = [np.array(bucket.reference_s.get(metric, ())) for bucket in found.buckets.values()]
    steps = known(np.concatenate([np.array([]), *(np.diff(np.log(of_bucket)) for of_bucket in times)]))
    return math.expm1(max(map(abs, bounds(steps, early=True)))) if len(steps) > 1 else math.inf


def leads(samples: Mapping[str, Sequence[Pair]], objective: Metric) -> bool:
    """Return whether the candidate is ahead so far in any bucket."""
    ratios = (known(log_ratios(pairs, objective)) for pairs in samples.values())
    return any(len(values) > 0 and float(np.median(values)) > 0 for values in ratios)


def known(values: Floats) -> Floats:
    """Return `values` without NaN."""
    kept: Floats = values[~np.isnan(values)]
    return kept


def speedup(log_values: Floats) -> Speedup:
    """Return the median ratio with its 95 % bootstrap interval."""
    values = known(log_values)
    if not len(values):
        return Speedup(math.nan, math.nan, math.nan, 0)
    low, high = bounds(values)
    return Speedup(math.exp(float(np.median(values))), math.exp(low), math.exp(high), len(values))


def failed(reason: str, noise: float, verdict: Verdict = Verdict.ERROR) -> Latency:
    """Return a verdict without figures."""
    unknown = Speedup(math.nan, math.nan, math.nan, 0)
    return Latency(verdict, reason, unknown, unknown, unknown, noise)


def _raw(timings: Sequence[Timing]) -> dict[str, tuple[float, ...]]:
    """Return the raw samples by metric."""
    return {m: tuple(getattr(t, f"{m}_s") for t in timings) for m in METRICS}
