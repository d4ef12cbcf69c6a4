"""Figures that are read when Prometheus asks: what serves, how full it is, what the engine has done so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ..runtime.batching.load import EngineLoad

ROWS = (1, 2, 4, 8, 16, 32, 64)  # sequences of a step; the engine has at most 64 rows


@dataclass(frozen=True)
class Snapshot:
    """What serves at one moment.

    Args:
        running, waiting: requests that are answered now, and that wait.
        ready: whether the server takes requests.
        state, transforms: what serves.
        resting: whether the circuit breaker has taken the plan out of service.
        bypassed: calls that the plan could not serve, by reason.
        load: of the engine, if callers' sequences are decoded together.
    """

    running: int = 0
    waiting: int = 0
    ready: bool = False
    state: str = ""
    transforms: str = ""
    resting: bool = False
    bypassed: Mapping[str, int] = field(default_factory=dict)
    load: EngineLoad = field(default_factory=EngineLoad)


class Total:
    """A sum over counts of which each begins at 0, as another plan's does. 0 itself says that no plan serves."""

    def __init__(self) -> None:
        self.value = 0
        self._seen = 0

    def follow(self, count: int) -> int:
        """Take over how far the present count is. Returns the sum."""
        if count:
            self.value += count - self._seen if count >= self._seen else count
            self._seen = count
        return self.value


class Exposition(Collector):
    """Gives the latest snapshot to Prometheus.

    Args:
        model: the name that the model is served under, a label of every figure.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._queried, self._reused = Total(), Total()
        self._steps: dict[int, Total] = {}
        self.latest = Snapshot()

    def collect(self) -> Iterator[Metric]:
        now, load = self.latest, self.latest.load
        yield self._gauge("num_requests_running", "Answers under way that do not wait.", now.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for a row or for their turn.", now.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache that holds tokens. 1 is all of it.", load.usage)
        yield self._gauge("ready", "1 if the server takes requests.", now.ready)
        yield self._gauge("plan_breaker_open", "1 if the circuit breaker has taken the plan out.", now.resting)
        labels = {"state": now.state, "transforms": now.transforms}
        yield self._gauge("plan_info", "What serves.", 1, **labels)
        bypassed = CounterMetricFamily(
            "autotune:bypassed", "Calls that the plan could not serve.", labels=["model_name", "reason"]
        )
        for reason, count in now.bypassed.items():
            bypassed.add_metric([self._model, reason], count)
        yield bypassed
        yield self._counter(
            "prefix_cache_queries",
            "Tokens of prompts that were looked for among earlier ones.",
            load.queried,
            self._queried,
        )
        yield self._counter(
            "prefix_cache_hits", "Tokens of prompts that earlier prompts began with.", load.reused, self._reused
        )
        yield self._rows(load.steps)

    def _gauge(self, name: str, text: str, value: float, **labels: str) -> Metric:
        family = GaugeMetricFamily(f"autotune:{name}", text, labels=["model_name", *labels])
        family.add_metric([self._model, *labels.values()], value)
        return family

    def _counter(self, name: str, text: str, count: int, total: Total) -> Metric:
        family = CounterMetricFamily(f"autotune:{name}", text, labels=["model_name"])
        family.add_metric([self._model], total.follow(count))
        return family

    def _rows(self, steps: Mapping[int, int]) -> Metric:
        for rows, count in steps.items():
            self._steps.setdefault(rows, Total()).follow(count)
        totals = {rows: total.value for rows, total in self._steps.items()}
        family = HistogramMetricFamily("autotune:step_rows", "Sequences of a decode step.", labels=["model_name"])
        bounds = [(str(most), sum(n for rows, n in totals.items() if rows <= most)) for most in ROWS]
        buckets = [*bounds, ("+Inf", sum(totals.values()))]
        family.add_metric([self._model], buckets, sum(rows * n for rows, n in totals.items()))
        return family
