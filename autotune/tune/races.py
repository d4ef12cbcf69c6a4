"""The races of a tune: requests timed in pairs, for as long as the budget allows and their answer is not clear."""

from __future__ import annotations

import math
from dataclasses import replace

from ..model.linear_layers import stored_bytes
from ..profile.survey import cache_bytes
from ..runtime.variant import Variant
from ..validate import Latency, Verdict, latency
from ..validate.limits import Limits
from ..validate.ratios import own_noise
from ..workload import Bucket, Metric, Workload
from .allowance import Allowance
from .policy import Policy

SPOT_TOKENS = 8  # new tokens of a request that times a kept plan again, or the machine's noise


class Races:
    """Times variants of one model against each other.

    Args:
        original: the variant without transforms.
        workload: whose requests are timed.
        noise_prompts: with which the machine's noise is measured.

    Attributes:
        noise: the noise floor of this host, a fraction; None until a small gain needed it and it could be measured.
    """

    def __init__(
        self,
        original: Variant,
        workload: Workload,
        noise_prompts: tuple[tuple[int, ...], ...],
        policy: Policy,
        allowance: Allowance,
    ) -> None:
        self.original = original
        self.buckets = workload.buckets()
        self.noise_prompts = noise_prompts
        self.policy = policy
        self.allowance = allowance
        self.noise: float | None = None

    def measured_noise(self) -> float | None:
        """Time the original against itself. None if too many of these requests were disturbed."""
        doing = self.allowance.doing("timing the original against itself")
        clock = self.original.clock
        found = latency.noise_floor(self.original, self.short, self.noise_prompts, clock=clock, progress=doing)
        return found if math.isfinite(found) else None

    @property
    def short(self) -> tuple[Bucket, ...]:
        """The first bucket with short answers, for timings that do not depend on the answers' length."""
        return tuple(replace(b, new_tokens=min(b.new_tokens, SPOT_TOKENS)) for b in self.buckets[:1])

    def compare(
        self,
        reference: Variant,
        candidate: Variant,
        objective: Metric,
        work: Workload,
        pairs: int,
        seed: int = 0,
        buckets: tuple[Bucket, ...] = (),
        limits: Limits | None = None,
        kept_s: float = 0.0,
        noise: float | None = None,
    ) -> Latency:
        """Time two variants in pairs.

        Args:
            objective: what has to gain.
            work: whose prompts are asked.
            pairs: of requests, at most.
            buckets: sizes of requests; none: all of the workload's.
            limits: in place of the policy's.
            kept_s: seconds of the budget that are left to what follows.
            noise: of this host, a fraction, in place of what is measured where a gain is small.
        """
        limits = limits or self.limits(reference, candidate)

        def race(noise: float) -> Latency:
            return latency.compare(
                reference,
                candidate,
                buckets or self.buckets,
                work.prompts,
                objective=objective,
                limits=limits,
                clock=self.original.clock,
                max_pairs=pairs,
                budget_s=self.allowance.longest_race_s(kept_s),
                noise=noise,
                seed=seed,
                progress=self.allowance.doing("timing requests in pairs"),
            )

        if noise is not None:
            return race(noise)
        if self.noise is None:  # measuring it takes long, and it matters only for small gains
            found = race(noise=0.0)
            if found.verdict is not Verdict.PASS or limits.min_gain < 0:
                return found
            own: float = own_noise(found, objective)
            if getattr(found, objective).low >= 1 + 2 * own:
                return replace(found, noise=own)
            if self.allowance.left_s < 0:
                reason = "the gain is small, and the budget was spent before this machine's noise was measured"
                return replace(found, verdict=Verdict.INCONCLUSIVE, reason=reason)
            self.noise = self.measured_noise()
            if self.noise is None:
                reason = "the gain is small, and too many requests were disturbed to measure this machine's noise"
                return replace(found, verdict=Verdict.INCONCLUSIVE, reason=reason)
        return race(noise=self.noise)

    def limits(self, reference: Variant, candidate: Variant) -> Limits:
        """The policy's limits. If memory is the objective, a variant that needs less of it need not gain time."""
        limits = self.policy.limits
        if self.policy.objective == "memory" and own_memory(candidate) < own_memory(reference):
            return replace(limits, min_gain=-1.0)
        return limits


def own_memory(variant: Variant) -> int:
    """Bytes of the serving weights, which remain when the original is released, and of a full KV cache."""
    held = cache_bytes(variant, max(variant.batch_sizes), variant.context_tokens)
    return stored_bytes(*variant.modules.values()) + held
