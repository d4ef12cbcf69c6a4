"""Pure sequential tests: is a serving plan still as good and as fast as when it was committed?"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from ...validate import Latency
from ...workload import Bucket

FALSE_ALARM_SAMPLES = 1000.0  # least mean number of samples to a false alarm, for a plan within its limit
STAKE = 0.25  # share of the evidence staked on each sample; a divergence of 3x the limit is found in 18 samples

SLOWER = 1.3  # the slow-down to detect, as a ratio of times
ALLOWANCE = math.log(SLOWER) / 2  # log ratio subtracted from each call: half the shift to detect, as Page chose
DECISION = 1.5  # alarm threshold of the sum of log ratios; finds a slow-down of 30 % in 12 calls, of 100 % in 6
OUTLIER = 0.4  # largest log ratio of one call, so that one slow call counts as 1.5 times as long at most
FIRST_CALLS = 16  # calls whose median sets the expected time of a shape that was not measured at commit

COMPILED_CALLS = 8  # alarm if this many of the last `LOOKED_AT` calls compiled; torch's own limit for one function
LOOKED_AT = 32  # number of latest calls examined for compilation


@dataclass(frozen=True)
class DivergenceCusum:
    """Evidence that the mean divergence is over a limit, sample by sample.

    An e-detector (Shin, Ramdas and Rinaldo, E-detectors: a nonparametric framework for sequential change detection,
    2024): each sample multiplies the evidence by 1 + stake x (kld / limit - 1), which is 1 or less on average while the
    mean is within the limit, for any distribution. Evidence below 1 is reset to 1. An alarm at `FALSE_ALARM_SAMPLES`
    means that a false alarm comes after at least that number of samples on average.

    Args:
        limit: the tier's limit of the mean KL divergence, nats.
        evidence: the evidence so far.
        samples: number of samples so far.
        total: sum of their divergences, nats.
    """

    limit: float
    evidence: float = 1.0
    samples: int = 0
    total: float = 0.0

    def after(self, kld: float) -> DivergenceCusum:
        """Return the evidence after one more sample, given its mean divergence, nats."""
        gain = 1 + STAKE * (kld / self.limit - 1)
        return replace(self, evidence=max(1.0, self.evidence) * gain, samples=self.samples + 1, total=self.total + kld)

    @property
    def alarmed(self) -> bool:
        return self.evidence >= FALSE_ALARM_SAMPLES

    @property
    def mean(self) -> float:
        return self.total / self.samples if self.samples else math.nan


@dataclass(frozen=True)
class LatencyCusum:
    """Whether calls of one shape take longer than expected.

    A CUSUM of log(time / expected) (Page, Continuous Inspection Schemes, Biometrika 1954).

    Args:
        expected_s: expected time per token, seconds; None until `FIRST_CALLS` calls have shown it.
        excess: the CUSUM: sum of log(time / expected), less the allowance per call.
        first_s: times per token of the first calls, seconds, until `expected_s` is known.
    """

    expected_s: float | None = None
    excess: float = 0.0
    first_s: tuple[float, ...] = ()

    def after(self, tpot_s: float) -> LatencyCusum:
        """Return the sum after one more call, given its time per token, seconds."""
        if self.expected_s is None:
            first = (*self.first_s, tpot_s)
            return LatencyCusum(median(first)) if len(first) >= FIRST_CALLS else LatencyCusum(first_s=first)
        longer = min(OUTLIER, math.log(tpot_s / self.expected_s))
        return replace(self, excess=max(0.0, self.excess + longer - ALLOWANCE))

    @property
    def alarmed(self) -> bool:
        return self.excess >= DECISION


Shape = tuple[int, int]  # batch size, bit length of the prompt's length


def shape_of(batch: int, prompt_tokens: int) -> Shape:
    """Key of calls with comparable times per token: the same batch size, prompt lengths within a factor of two."""
    return batch, max(0, prompt_tokens - 1).bit_length()


def paces_at_commit(latency: Latency | None) -> tuple[dict[Shape, float], dict[Shape, float]]:
    """Median times per token of each bucket as measured at commit, seconds: the plan's, and the original's."""
    plan, original = dict[Shape, float](), dict[Shape, float]()
    for label, times in latency.buckets.items() if latency else ():
        bucket = Bucket.of(label)
        for found, seconds in ((plan, times.candidate_s), (original, times.reference_s)):
            if known := [t for t in seconds.get("tpot", ()) if math.isfinite(t)]:
                found[shape_of(bucket.batch, bucket.prompt_tokens)] = median(known)
    return plan, original


@dataclass
class Compilations:
    """Detects calls that compile over and over.

    Attributes:
        compiled: whether each of the last `LOOKED_AT` calls compiled something.
    """

    compiled: deque[bool] = field(default_factory=lambda: deque(maxlen=LOOKED_AT))

    def note(self, graphs_before: int, graphs_after: int) -> bool:
        """Record one more call. Returns whether too many of the last calls compiled.

        Args:
            graphs_before: number of compiled graphs before the call.
            graphs_after: number of compiled graphs after the call.
        """
        self.compiled.append(graphs_after > graphs_before)
        return sum(self.compiled) >= COMPILED_CALLS


def describe(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
