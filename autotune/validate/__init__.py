"""Is it faster, and is it no worse? Verdicts with numbers; only PASS commits.

tiers -> texts -> exam -> score -> divergence -> tally -> quality     no worse than the original?
sensitivity                                                  which layers make it worse?
timing -> ratios -> latency                                  faster than what is there?
statistics                                                   bounds for both
answers                                                      what is kept of the original's between runs
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Verdict(enum.StrEnum):
    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


@dataclass(frozen=True)
class ConfidenceBin:
    """Tokens of which the original was about equally sure.

    Args:
        low, high: probability of the original's top token, from and up to.
        tokens: how many.
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
        reason: one sentence with the number that decided.
        mean_kld, mean_kld_high: mean KL(original || candidate) per token in nats, and its upper 95 % bound.
        p99_kld, max_kld: point estimates; the maximum is never gated.
        same_top, same_top_low: share of tokens with the same top token (near-ties excused), and its lower 95 % bound.
        ppl_ratio, ppl_ratio_high: candidate's perplexity / original's, and its upper 95 % bound.
        delta_p_rms: RMS change of the probability of the true token.
        tokens, prompts: how many were scored.
        strata: mean KLD by stratum ("natural", "own", "second-prompt", "padded-batch", "long", ...).
        certainty: the same tokens by how sure the original was of them; only such as there are.
        examined: whether the candidate was examined at all. False: there was no exam, or the candidate left prompts of
            it to the original; the verdict is INCONCLUSIVE then and says nothing about the candidate's output.
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
    """A ratio of times, reference / candidate: above 1 the candidate is faster."""

    ratio: float
    low: float  # lower 95 % bound
    high: float  # upper 95 % bound
    pairs: int


@dataclass(frozen=True)
class Latency:
    """Paired, interleaved timing of a candidate against a reference.

    Args:
        verdict: PASS, FAIL, INCONCLUSIVE or ERROR.
        reason: one sentence with the number that decided.
        ttft, tpot, end_to_end: speed-ups over all buckets (the worst bucket's where they differ in sign).
        noise: A/A half-width this host showed, as a fraction.
        buckets: per bucket name "b1/p64/n32" the three speed-ups by metric name.
        reference_s, candidate_s: raw samples by metric name ("ttft", "tpot", "end_to_end").
        warnings: what the measurement noticed about its own noise.
        drowned: whether it fails for this machine's noise alone, which hides a gain that may be worth having.
    """

    verdict: Verdict
    reason: str
    ttft: Speedup
    tpot: Speedup
    end_to_end: Speedup
    noise: float
    buckets: dict[str, dict[str, Speedup]] = field(default_factory=dict)
    reference_s: dict[str, tuple[float, ...]] = field(default_factory=dict)
    candidate_s: dict[str, tuple[float, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    drowned: bool = False
