"""What a run found, as values that JSON can hold, and the arithmetic on them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.measures import Metric


@dataclass(frozen=True)
class Spread:
    """Median of the rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    def scaled(self, by: float) -> Spread:
        return Spread(self.median * by, self.low * by, self.high * by)


@dataclass
class Result:
    """One runtime.

    Args:
        name, label: as in `peers.PEERS`.
        missing: why there are no figures, or "".
        samples: metric name to one value a round, None where the request failed.
        bandwidths: metric name to the memory's read bandwidth right before and after each sample, bytes/s; their mean.
        failures: metric name to why.
        cold_s, warm_s: from the start of the process to the first answer, with empty caches and with filled ones.
        rss_bytes, peak_bytes: resident memory of the process after the first answer, and at most.
        stored_bytes, read_bytes: bytes of weights, in all and read for a token of one sequence.
        quality: path to `Quality`.
        notes: what a reader should know.
    """

    name: str
    label: str
    missing: str = ""
    samples: dict[str, list[float | None]] = field(default_factory=dict)
    bandwidths: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    cold_s: float | None = None
    warm_s: float | None = None
    rss_bytes: int | None = None
    peak_bytes: int | None = None
    stored_bytes: int | None = None
    read_bytes: int | None = None
    quality: dict[str, Quality] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def spread(self, metric: str) -> Spread | None:
        return spread(self.samples.get(metric, ()))

    @property
    def worst(self) -> Quality | None:
        """The quality of the path that is furthest from the reference."""
        return max(self.quality.values(), key=lambda q: q.mean_kld, default=None)


@dataclass(frozen=True)
class Quality:
    """Divergence from the reference on held-out text.

    Args:
        mean_kld: KL(reference || runtime), nats a token.
        same_top: share of tokens where both find the same token likeliest.
        tokens: how many were compared.
    """

    mean_kld: float
    same_top: float
    tokens: int


@dataclass
class Run:
    """All of them, and where they ran.

    Args:
        created: ISO 8601, UTC.
        model: its name.
        machine: processor, instruction set, versions, ... as `hardware.identify` has them.
        threads: that every runtime computes with.
        rounds: how many were timed.
        reference: name of the result that ratios refer to.
        results: in the table's order.
    """

    created: str
    model: str
    machine: Mapping[str, object]
    threads: int
    rounds: int
    reference: str
    results: list[Result]
    seconds: float = 0.0

    def of(self, name: str) -> Result | None:
        """The result of this name, if it has figures."""
        return next((r for r in self.results if r.name == name and not r.missing), None)

    @property
    def bandwidth(self) -> Spread | None:
        """Read bandwidth over the whole run, bytes/s."""
        return spread([each for r in self.results for found in r.bandwidths.values() for each in found])


def spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(median(known), min(known), max(known)) if known else None


def speedup(reference: Result | None, candidate: Result, metric: Metric) -> Spread | None:
    """How many times as fast `candidate` is, round by round, so that what slows a whole round cancels."""
    if reference is None:
        return None
    pairs = zip(reference.samples.get(metric.name, ()), candidate.samples.get(metric.name, ()), strict=False)
    both = [(a, b) for a, b in pairs if a and b]
    return spread([a / b if metric.smaller_is_better else b / a for a, b in both])


def roofline_share(result: Result, metric: Metric) -> Spread | None:
    """The bandwidth that reading the weights once a token uses, over the one measured in the same round.

    The KV cache comes on top.
    """
    if result.read_bytes is None:
        return None
    pairs = zip(result.samples.get(metric.name, ()), result.bandwidths.get(metric.name, ()), strict=True)
    return spread([result.read_bytes / (ms / 1e3) / bandwidth for ms, bandwidth in pairs if ms])
