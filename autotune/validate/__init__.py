"""Judge whether a candidate is faster and no worse. Verdicts come with numbers; only PASS commits.

tiers -> texts -> exam -> score -> divergence -> tally -> quality     no worse than the original?
sensitivity                                                  which layers make it worse?
timing -> ratios -> latency                                  faster than what is there?
statistics                                                   bounds for both
answers                                                      the original's answers, kept between runs
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..workload import by_bucket


class Verdict(enum.StrEnum):
    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


@dataclass(frozen=True)
class ConfidenceBin:
    """The tokens of which the original was about equally sure.

    Args:
        low, high: range of the probability of the original's top token.
        tokens: how many there are.
        p50_kld, p90_kld, p99_kld, max_kld: quantiles of their KL divergence, nats.
        same_top: share of them with the same top token (near-ties excused).
    """

    low: float
    high: float
    tokens: int
    p50_kld: float
    p90_kld: float
    p99_kld: float
    max_kld: float
    same_top: float


@dataclass(frozen=True)
class Quality:
    """How far a candidate's output distribution is from the original's.

    Args:
        tier: tier it was judged at.
        verdict: PASS, FAIL, INCONCLUSIVE or ERROR.
        reason: one sentence with the decisive number.
        mean_kld, mean_kld_high: mean KL(original || candidate) per token in nats, and its upper 95 % bound.
        p99_kld, max_kld: point estimates; the maximum has no limit.
        same_top, same_top_low: share of tokens with the same top token (near-ties excused), and its lower 95 % bound.
        ppl_ratio, ppl_ratio_high: candidate's perplexity / original's, and its upper 95 % bound.
        delta_p_rms: RMS change of the probability of the true token.
        tokens, prompts: how many were scored.
        strata: mean KLD by stratum ("natural", "own", "second-prompt", "padded-batch", "long", ...).
        certainty: the same tokens by how sure the original was of them, without empty bins.
        examined: whether the candidate was examined at all. False: there was no exam, or the candidate left some of its
            prompts to the original. Then the verdict is INCONCLUSIVE and says nothing about the candidate's output.
    """

    tier: str
    verdict: Verdict
    reason: str
    mean_kld: float = float("nan")
    mean_kld_high: float = float("nan")
    p99_kld: float = float("nan")
    max_kld: float = float("nan")
    same_top: float = float("nan")
    same_top_low: float = float("nan")
    ppl_ratio: float = float("nan")
    ppl_ratio_high: float = float("nan")
    delta_p_rms: float = float("nan")
    tokens: int = 0
    prompts: int = 0
    strata: dict[str, float] = field(default_factory=dict)
    certainty: tuple[ConfidenceBin, ...] = ()
    examined: bool = True


@dataclass(frozen=True)
class Speedup:
    """A ratio of times, reference / candidate. Above 1, the candidate is faster."""

    ratio: float
    low: float  # lower 95 % bound
    high: float  # upper 95 % bound
    pairs: int


@dataclass(frozen=True)
class BucketTimes:
    """One bucket of the workload, timed on both arms.

    Args:
        speedups: by metric name ("ttft", "tpot", "end_to_end").
        reference_s, candidate_s: raw samples in seconds by metric name, those of disturbed pairs included.
    """

    speedups: Mapping[str, Speedup]
    reference_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    candidate_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency:
    """Paired, interleaved timing of a candidate against a reference.

    Args:
        verdict: PASS, FAIL, INCONCLUSIVE or ERROR.
        reason: one sentence with the decisive number.
        ttft, tpot, end_to_end: speed-ups over all buckets; the worst bucket's if the buckets differ in sign.
        noise: A/A half-width measured on this host, as a fraction.
        buckets: by `Bucket.label` ("b1/p64/n32").
        warnings: those about the measurement's noise.
        drowned: whether it fails only because of this machine's noise, which may hide a useful gain.
    """

    verdict: Verdict
    reason: str
    ttft: Speedup
    tpot: Speedup
    end_to_end: Speedup
    noise: float
    buckets: Mapping[str, BucketTimes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    drowned: bool = False

    @staticmethod
    def from_earlier(table: Mapping[str, Any]) -> Mapping[str, Any]:
        """Convert the JSON of earlier versions, which kept the samples of all buckets in one row, bucket by bucket."""
        if "reference_s" not in table:
            return table
        kept = {arm: table[arm] for arm in ("reference_s", "candidate_s")}
        rest = {key: value for key, value in table.items() if key not in kept}
        samples = by_bucket(kept, list(rest["buckets"]))
        return rest | {"buckets": {b: {"speedups": found} | samples[b] for b, found in rest["buckets"].items()}}
