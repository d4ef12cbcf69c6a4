"""Thresholds of the quality tiers, and how much text an exam reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

Z_95 = 1.645  # standard deviations from the mean to a one-sided 95 % bound


@dataclass(frozen=True)
class Tier:
    """Limits on how far a candidate's next-token distribution may be from the original's.

    Args:
        name: "lossless", "strict", "relaxed" or "aggressive".
        mean_kld: upper 95 % bound of the mean KL(original || candidate) per token, nats.
        p99_kld: 99th percentile of that KL divergence, a point estimate.
        same_top: lower 95 % bound of the share of tokens with the same top token; near-ties count as the same.
        ppl_ratio: candidate's perplexity / original's.
        noise_factor: the mean KLD may also reach this many times the original's own A/A noise.
    """

    name: str
    mean_kld: float
    p99_kld: float
    same_top: float
    ppl_ratio: float
    noise_factor: float = 0.0

    def kld_limit(self, noise_kld: float) -> float:
        """Return the limit of the mean KLD for an original whose own noise is `noise_kld` nats."""
        return max(self.mean_kld, self.noise_factor * noise_kld)

    def ppl_limit(self, noise_kld: float, tokens: int) -> float:
        """Return the limit of the perplexity ratio's upper bound, if the original's own noise is `noise_kld` nats.

        Rounding to 16 bits changes every token's probability, even for a candidate that computes the same. The variance
        of a log-likelihood ratio is about twice the KL divergence. Over `tokens` tokens, the mean of such a candidate
        therefore has a standard deviation of sqrt(2 noise / tokens). Its upper bound may be off by `Z_95` of them for
        the mean and `Z_95` more for the bound, in addition to the noise itself. In FP32 all of this is close to zero.
        """
        spread = math.sqrt(2 * noise_kld / max(tokens, 1))
        return self.ppl_ratio * math.exp(noise_kld + 2 * Z_95 * spread)

    def for_size(self, size: Size) -> Tier:
        """Return the limits for an exam of this size: these, or wider ones if it only looks for what broke.

        The perplexity of few tokens is uncertain: a candidate at the limit of the mean KLD has a log-likelihood ratio
        whose mean has a standard deviation of sqrt(2 KLD / tokens) (see `ppl_limit`). It is allowed `slack` of them.
        """
        if size.slack == 1:
            return self
        spread = math.sqrt(2 * self.mean_kld / size.tokens)
        return replace(
            self,
            mean_kld=size.slack * self.mean_kld,
            p99_kld=size.slack * self.p99_kld,
            same_top=1 - size.slack * (1 - self.same_top),
            ppl_ratio=math.exp(size.slack * (math.log(self.ppl_ratio) + spread)),
            noise_factor=size.slack * self.noise_factor,
        )


# Published readings of llama.cpp's perplexity tool on 7-8B models, Wikitext-2: BF16 against FP16 of one model 0.000025
# nats and 99.7 % same top token; q8_0 0.0004 to 0.0014 and 97.7 to 98.8 %; q4_K_M 0.013 to 0.031 and 92 to 95 %.
# Smaller models read a few times higher (135M, 8-bit weights in groups of 32: 0.0017 and 98.1 %), so the limits are set
# well above these readings.
TIERS: dict[str, Tier] = {
    tier.name: tier
    for tier in (
        Tier("lossless", mean_kld=5e-4, p99_kld=0.01, same_top=0.995, ppl_ratio=1.001, noise_factor=5.0),
        Tier("strict", mean_kld=0.005, p99_kld=0.05, same_top=0.965, ppl_ratio=1.005),
        Tier("relaxed", mean_kld=0.05, p99_kld=0.5, same_top=0.90, ppl_ratio=1.05),
        Tier("aggressive", mean_kld=0.15, p99_kld=1.5, same_top=0.82, ppl_ratio=1.15),
    )
}

NEAR_TIE_NATS = 0.05  # a flip between tokens this close is a tie; vLLM's check_logprobs_close allows such flips, too


@dataclass(frozen=True)
class Size:
    """How much an exam reads.

    Args:
        prompts: different prompts needed; with fewer the verdict is inconclusive, because the bounds resample prompts.
        natural: tokens at the end of each prompt, scored one by one.
        own: tokens of the original's continuation, scored one by one; also the length of free-running output.
        padded: tokens of each prompt scored in left-padded batches.
        lengths: context lengths at which longer texts are scored, too. Only they show errors that grow with the
            context. At least four are needed: fewer texts fail only a candidate that is far over a limit.
        slack: factor on a tier's limits. With few tokens, chance alone may put a good candidate over a limit.
    """

    prompts: int
    natural: int
    own: int
    padded: int
    lengths: tuple[int, ...]
    slack: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens scored one by one at batch 1 if every prompt is long enough."""
        return self.prompts * (self.natural + self.own)


SIZES: dict[str, Size] = {
    # for a candidate that passed an exam before: shows whether it broke, cannot pass a new one
    "brief": Size(4, natural=6, own=6, padded=4, lengths=(), slack=3.0),
    "quick": Size(16, natural=16, own=16, padded=24, lengths=(256, 256, 512, 512)),
    "standard": Size(64, natural=24, own=24, padded=16, lengths=(256, 512, 512, 1024, 1024)),
    "thorough": Size(128, natural=48, own=48, padded=32, lengths=(256, 512, 1024, 2048)),
}
