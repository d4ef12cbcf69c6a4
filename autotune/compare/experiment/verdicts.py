"""Verdicts from an experiment's pairs: for each bucket, for each candidate, and for all candidates together. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...report import numbers as n
from ...validate import Latency, Quality, Verdict
from ...validate.limits import Limits
from ...validate.ratios import EARLY_ALPHA, FINAL_ALPHA, decide, known, log_ratios, pooled
from ...validate.timing import Pair
from ...workload import METRICS, Bucket, Metric
from .results import Cell, Outcome

Pairs = Mapping[str, Sequence[Pair]]  # bucket label -> pairs, in the order of rounds


@dataclass(frozen=True)
class Terms:
    """The terms by which a candidate is judged.

    Args:
        objective: the metric that must gain.
        limits: least gain, and what must not get worse.
        noise: A/A half-width, a fraction.
    """

    objective: Metric
    limits: Limits
    noise: float

    @property
    def gate(self) -> float:
        """The least speed-up that counts, as in `validate.ratios.decide`."""
        least = self.limits.min_gain
        return 1 + (max(least, 2 * self.noise) if least >= 0 else least)


def chance(pairs: Pairs, terms: Terms) -> float:
    """The p-value under the hypothesis that a candidate is no faster than the gate: the sign test on the pairs' ratios.

    It is exact for any distribution of the ratios (Conover, Practical Nonparametric Statistics, 1999, section 3.4): if
    their median were at the gate, each ratio would be above it with probability one half.
    """
    if not all(pairs.values()):
        return 1.0
    values = known(pooled({b: {m: log_ratios(p, m) for m in METRICS} for b, p in pairs.items()}, terms.objective))
    if not len(values) or not math.isfinite(terms.gate):
        return 1.0
    above, count = int(np.sum(values > math.log(terms.gate))), len(values)
    return float(sum(math.comb(count, k) for k in range(above, count + 1)) / 2**count)


def holm(chances: Mapping[str, float], alpha: float = FINAL_ALPHA) -> frozenset[str]:
    """The candidates whose gain stands after correction for the number of candidates.

    Holm's step-down procedure (A simple sequentially rejective multiple test procedure, Scandinavian Journal of
    Statistics 6, 1979): the chance that any candidate without a gain is among them is at most `alpha`.
    """
    standing: list[str] = []
    for tried, name in enumerate(sorted(chances, key=lambda name: chances[name])):
        if chances[name] > alpha / (len(chances) - tried):
            break
        standing.append(name)
    return frozenset(standing)


def is_settled(pairs: Pairs, terms: Terms, candidates: int) -> bool:
    """Whether a candidate's result is clear enough to stop timing it before the last pair.

    A gain is clear if it would stand among `candidates` at the level of an early look (Bonferroni). Looks and levels
    are those of `validate.latency.race`.
    """
    found = decide(pairs, terms.objective, terms.limits, terms.noise, early=True)
    if found.verdict is Verdict.PASS:
        return chance(pairs, terms) <= EARLY_ALPHA / candidates
    return found.verdict is Verdict.FAIL


def correct(latencies: Mapping[str, Latency], chances: Mapping[str, float]) -> dict[str, tuple[Verdict, str]]:
    """Verdict and reason by candidate, corrected for the number of candidates."""
    standing = holm(chances)
    found = {}
    for name, latency in latencies.items():
        if latency.verdict is Verdict.PASS and name not in standing:
            among = f"one of {len(chances)} candidates" if len(chances) > 1 else "so few pairs"
            why = f"not clear for {among} (p = {chances[name]:.2g}, Holm at {FINAL_ALPHA}): {latency.reason}"
            found[name] = (Verdict.INCONCLUSIVE, why)
        else:
            found[name] = (latency.verdict, latency.reason)
    return found


def cells(pairs: Pairs, terms: Terms) -> tuple[Cell, ...]:
    """Judge each bucket alone. Descriptive: not corrected for the number of buckets."""
    return tuple(_cell(bucket, own, terms) for bucket, own in pairs.items())


def _cell(bucket: str, pairs: Sequence[Pair], terms: Terms) -> Cell:
    found = decide({bucket: pairs}, terms.objective, terms.limits, terms.noise)
    clean = [p for p in pairs if not p.polluted]
    rates = [_tokens_per_s(bucket, [getattr(p, arm).end_to_end_s for p in clean]) for arm in ("candidate", "reference")]
    return Cell(bucket, found.verdict, found.reason, found.ttft, found.tpot, found.end_to_end, *rates)


def _tokens_per_s(bucket: str, seconds: Sequence[float]) -> float:
    """New tokens of all sequences per second of a request, for a bucket's label."""
    shape = Bucket.of(bucket)
    return shape.batch * shape.new_tokens / float(np.median(seconds)) if seconds else math.nan


def weigh(
    latency: tuple[Verdict, str],
    quality: Quality | None,
    unjudged: str | None,
    memory: tuple[float, float],
    most: float,
) -> tuple[Verdict, str]:
    """A candidate's verdict and the sentence that decided. An error decides first, then a failure, then an open result.

    Args:
        latency: verdict and reason, corrected.
        quality: quality compared with the control, or None.
        unjudged: why there is no quality.
        memory: most bytes that the candidate and the control hold.
        most: largest allowed ratio of the two.
    """
    parts = [("quality", quality.verdict, quality.reason)] if quality else []
    parts.append(("latency", *latency))
    if memory[0] > most * memory[1]:
        grown = f"{n.scaled(memory[0], 'B')} is over {most:g} times the control's {n.scaled(memory[1], 'B')}"
        parts.append(("memory", Verdict.FAIL, grown))
    for verdict in (Verdict.ERROR, Verdict.FAIL, Verdict.INCONCLUSIVE):
        for what, found, reason in parts:
            if found is verdict:
                return verdict, f"{what}: {reason}"
    held = f"quality {quality.reason}" if quality else f"quality not compared: {unjudged}"
    return Verdict.PASS, f"{latency[1]}; {held}"


def conclude(candidates: Sequence[Outcome]) -> tuple[Verdict, str]:
    """The whole experiment's verdict, and why, in a sentence."""
    by: dict[Verdict, list[str]] = {}
    for outcome in candidates:
        by.setdefault(outcome.verdict, []).append(outcome.name)
    told = "; ".join(f"{verdict.value}: {', '.join(by[verdict])}" for verdict in Verdict if verdict in by)
    if Verdict.PASS in by:
        return Verdict.PASS, told
    if set(by) == {Verdict.ERROR}:
        return Verdict.ERROR, told
    return (Verdict.INCONCLUSIVE if Verdict.INCONCLUSIVE in by else Verdict.FAIL), told
