"""Is a plan that serves still as good and as fast as when it was committed? Sequential rules, pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from ...validate import Latency

FALSE_ALARM_SAMPLES = 1000.0  # samples of a plan within its limit until a false alarm, on average at least
STAKE = 0.25  # share of the evidence that is staked on each sample: three times the limit is found in 18 of them

SLOWER = 1.3  # the slow-down that is to be found
ALLOWANCE = math.log(SLOWER) / 2  # half of it, Page's choice for the shift that matters
DECISION = 1.5  # a slow-down of 30 % is found in 12 calls, of 100 % in 6
OUTLIER = 0.4  # one slow call counts no more than as 1.5 times as long
FIRST_CALLS = 16  # make the expectation of a shape that was not measured at commit

COMPILED_CALLS = 8  # calls that compiled, of the last `LOOKED_AT`; torch's own limit for one function
LOOKED_AT = 32


@dataclass(frozen=True)
class Divergence:
    """Evidence that the mean divergence is over a limit, sample by sample.

    An e-detector (Shin, Ramdas and Rinaldo, E-detectors: a nonparametric framework for sequential change detection,
    2024): each sample multiplies the evidence by 1 + stake x (kld / limit - 1), which is 1 or less on average while the
    mean is within the limit, whatever the distribution; evidence below 1 starts afresh. Alarm at `FALSE_ALARM_SAMPLES`
    keeps the mean run to a false alarm at least as long.

    Args:
        limit: mean KL divergence of the tier, nats.
        evidence: so far.
        samples: how many.
        total: sum of their divergences, nats.
    """

    limit: float
    evidence: float = 1.0
    samples: int = 0
    total: float = 0.0

    def after(self, kld: float) -> Divergence:
        """With one more sample's mean divergence, nats."""
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
        expected_s: time per token to expect; None until `FIRST_CALLS` calls have shown it.
        excess: how much longer calls took lately, summed.
        first_s: times of the first calls, while nothing is expected.
    """

    expected_s: float | None = None
    excess: float = 0.0
    first_s: tuple[float, ...] = ()

    def after(self, tpot_s: float) -> LatencyCusum:
        """With one more call's time per token."""
        if self.expected_s is None:
            first = (*self.first_s, tpot_s)
            return LatencyCusum(median(first)) if len(first) >= FIRST_CALLS else LatencyCusum(first_s=first)
        longer = min(OUTLIER, math.log(tpot_s / self.expected_s))
        return replace(self, excess=max(0.0, self.excess + longer - ALLOWANCE))

    @property
    def alarmed(self) -> bool:
        return self.excess >= DECISION


Shape = tuple[int, int]  # batch, magnitude of the prompt


def shape_of(batch: int, prompt_tokens: int) -> Shape:
    """Calls whose times per token may be compared: as many sequences, prompts within a factor of two."""
    return batch, max(0, prompt_tokens - 1).bit_length()


def expected_paces(latency: Latency | None) -> dict[Shape, LatencyCusum]:
    """What was measured at commit: the median time per token of each bucket.

    The raw samples of a `Latency` come bucket after bucket, equally many of each.
    """
    if latency is None or not latency.buckets:
        return {}
    times, found = latency.candidate_s.get("tpot", ()), {}
    each = len(times) // len(latency.buckets)
    for k, name in enumerate(latency.buckets):
        known = [t for t in times[k * each : (k + 1) * each] if t is not None and math.isfinite(t)]
        batch, prompt_tokens, _ = (int(part[1:]) for part in name.split("/"))
        if known:
            found[shape_of(batch, prompt_tokens)] = LatencyCusum(median(known))
    return found


@dataclass
class Compilations:
    """Whether calls compile over and over.

    Attributes:
        compiled: of the last calls, which compiled something.
    """

    compiled: deque[bool] = field(default_factory=lambda: deque(maxlen=LOOKED_AT))

    def note(self, graphs_before: int, graphs_after: int) -> bool:
        """Whether one more call makes it a storm."""
        self.compiled.append(graphs_after > graphs_before)
        return sum(self.compiled) >= COMPILED_CALLS


def describe(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
