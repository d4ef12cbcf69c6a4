"""Limits on what a candidate must gain and on what it may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The least gain, and limits on what gets worse. Fractions: 0.05 allows 5 %.

    Args:
        min_gain: a step must gain at least this on the phase it targets, and more than the noise. If it is negative, a
            step must not lose more than this.
        max_ttft_increase, max_tpot_increase, max_p90_increase: in every workload bucket, against the race's reference:
            the variant kept so far while the search tries candidates, the original when the winner is confirmed.
        max_memory_ratio: bytes of the original's and the variant's weights together / the original's. What they share
            counts once; KV caches and activations do not count.
    """

    min_gain: float = 0.03
    max_ttft_increase: float = 0.05
    max_tpot_increase: float = 0.05
    max_p90_increase: float = 0.10
    max_memory_ratio: float = 2.0
