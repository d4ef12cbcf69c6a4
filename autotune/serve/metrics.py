"""Counters, gauges and histograms in Prometheus' format, under vLLM's names with autotune's prefix."""

from __future__ import annotations

import math
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest

from .exposition import Exposition, Snapshot
from .timing import AnswerTimes

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
RECENT_S = 60.0  # seconds that percentiles look back
MOST_RECENT = 2000  # values that percentiles look back at most; sorting them takes 0.2 ms

ANSWERS = "/v1/"  # routes under it answer for the model
COUNTED = frozenset({"408", "429", "499"})  # late, refused and given up: of those, answers are counted


@dataclass(frozen=True)
class Percentiles:
    """Seconds that half of some recent values, and 99 % of them, do not exceed."""

    p50_s: float
    p99_s: float


@dataclass(frozen=True)
class Counts:
    """What was counted since the server began.

    Args:
        tokens: of all answers.
        answers: number of answers by why they ended.
        refused: requests that found the queue full.
        failed: answers of the model's routes by kind of error: "4xx", "5xx"; not those that are counted above.
    """

    tokens: int
    answers: Mapping[str, int]
    refused: int
    failed: Mapping[str, int]


class Recent:
    """The latest values of a figure: those of the last `RECENT_S` seconds, at most `MOST_RECENT`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._values = deque[tuple[float, float]](maxlen=MOST_RECENT)

    def add(self, value_s: float) -> None:
        self._values.append((self._clock(), value_s))

    def per_s(self) -> float:
        """Return how many came per second since the oldest that is kept; 0 without one."""
        self._forget()
        return len(self._values) / max(self._clock() - self._values[0][0], 1.0) if self._values else 0.0

    def percentiles(self) -> Percentiles | None:
        """Return the percentiles by nearest rank; None without a recent value."""
        self._forget()
        if not self._values:
            return None
        found = sorted(value for _, value in self._values)
        return Percentiles(*(found[math.ceil(share * len(found)) - 1] for share in (0.5, 0.99)))

    def _forget(self) -> None:
        since = self._clock() - RECENT_S
        while self._values and self._values[0][0] < since:
            self._values.popleft()


class Metrics:
    """What is counted about one server.

    Args:
        model: the name that the model is served under, a label of every figure.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        labels = {"model_name": model}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets).labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self.registry).labels(**labels)

        self._first = histogram("autotune:time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self._next = histogram("autotune:inter_token_latency_seconds", "Between two tokens of an answer.", SECONDS)
        self._whole = histogram("autotune:e2e_request_latency_seconds", "From arrival to the last token.", SECONDS)
        self._pace = histogram(
            "autotune:request_time_per_output_token_seconds", "Per token of an answer after its first.", SECONDS
        )
        self._queued = histogram(
            "autotune:request_queue_time_seconds", "From arrival to the beginning of the prompt.", SECONDS
        )
        self._reading = histogram(
            "autotune:request_prefill_time_seconds", "From the beginning of the prompt to the first token.", SECONDS
        )
        self._decode = histogram("autotune:request_decode_time_seconds", "From the first token to the last.", SECONDS)
        self._prompts = histogram("autotune:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._answers = histogram("autotune:request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._read = counter("autotune:prompt_tokens", "Tokens of all prompts.")
        self._written = counter("autotune:generation_tokens", "Tokens of all answers.")
        self.rejections = counter("autotune:admission_rejections", "Requests refused because too many waited.")
        self._finished = Counter(
            "autotune:request_success",
            "Answers that were finished, by why they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._unfinished = Counter(
            "autotune:request_unfinished",
            "Answers that came to no end, by what happened.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self._http = Counter(
            "autotune:http_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self._model = model
        self._exposition = Exposition(model)
        self._on_request = CollectorRegistry()  # read for Prometheus alone
        self._on_request.register(self._exposition)
        ProcessCollector(registry=self._on_request)
        self.first, self.next = Recent(), Recent()  # what the histograms of the same tokens count
        self.whole = Recent()  # the same of finished answers

    def token(self, seconds: float, *, first: bool) -> None:
        """A token came, so long after the one before it or, the first, after the request."""
        (self._first if first else self._next).observe(seconds)
        (self.first if first else self.next).add(seconds)
        self._written.inc()

    def finished(self, reason: str, prompt: int, times: AnswerTimes) -> None:
        """An answer was finished.

        Args:
            reason: "stop" or "length".
            prompt: tokens of its prompt.
            times: of its parts.
        """
        self._finished.labels(self._model, reason).inc()
        for histogram, seconds in (
            (self._queued, times.queue_s),
            (self._reading, times.prefill_s),
            (self._decode, times.decode_s),
            (self._pace, times.tpot_s),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        if times.last_s is not None:
            self._whole.observe(times.last_s - times.arrived_s)
            self.whole.add(times.last_s - times.arrived_s)
        self._prompts.observe(prompt)
        self._answers.observe(times.tokens)
        self._read.inc(prompt)

    def unfinished(self, reason: str) -> None:
        """An answer came to no end: its client went, the queue was full, its deadline passed, or it failed."""
        self._unfinished.labels(self._model, reason).inc()

    def answered(self, route: str, status: int) -> None:
        """A request to a route was answered."""
        self._http.labels(route, str(status)).inc()

    def counts(self) -> Counts:
        """Return what Prometheus' counters hold."""
        tokens, refused, answers, failed = 0.0, 0.0, dict[str, int](), Tally[str]()
        for sample in (sample for metric in self.registry.collect() for sample in metric.samples):
            match sample.name:
                case "autotune:generation_tokens_total":
                    tokens = sample.value
                case "autotune:admission_rejections_total":
                    refused = sample.value
                case "autotune:request_success_total":
                    answers[sample.labels["finished_reason"]] = int(sample.value)
                case "autotune:request_unfinished_total":
                    answers[sample.labels["reason"]] = int(sample.value)
                case "autotune:http_requests_total" if sample.labels["route"].startswith(ANSWERS):
                    status = sample.labels["status"]
                    if status[0] in "45" and status not in COUNTED:
                        failed[f"{status[0]}xx"] += int(sample.value)
        return Counts(int(tokens), answers, int(refused), dict(failed))

    def text(self, now: Snapshot) -> bytes:
        """Return all figures as Prometheus reads them."""
        self._exposition.latest = now
        return generate_latest(self.registry) + generate_latest(self._on_request)
