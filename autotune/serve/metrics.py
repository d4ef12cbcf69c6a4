"""Counters, gauges and histograms in Prometheus' format, under vLLM's names with autotune's prefix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


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

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model_name"], registry=self.registry).labels(**labels)

        self._first = histogram("autotune:time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self._next = histogram("autotune:inter_token_latency_seconds", "Between two tokens of an answer.", SECONDS)
        self._whole = histogram("autotune:e2e_request_latency_seconds", "From arrival to the last token.", SECONDS)
        self._prompts = histogram("autotune:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._answers = histogram("autotune:request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._read = counter("autotune:prompt_tokens", "Tokens of all prompts.")
        self._written = counter("autotune:generation_tokens", "Tokens of all answers.")
        self.rejections = counter("autotune:admission_rejections", "Requests refused because too many waited.")
        self._running = gauge("autotune:num_requests_running", "Answers under way.")
        self._ready = gauge("autotune:ready", "1 if the server takes requests.")
        self._ended = Counter(
            "autotune:request_success",
            "Answers by why they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._http = Counter(
            "autotune:http_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self._plan = Gauge(
            "autotune:plan_info", "What serves.", ["model_name", "state", "transforms"], registry=self.registry
        )
        self._model = model

    def token(self, seconds: float, *, first: bool) -> None:
        """A token came, so long after the one before it or, the first, after the request."""
        (self._first if first else self._next).observe(seconds)
        self._written.inc()

    def finished(self, reason: str, prompt: int, tokens: int, seconds: float) -> None:
        """An answer ended."""
        self._ended.labels(self._model, reason).inc()
        self._whole.observe(seconds)
        self._prompts.observe(prompt)
        self._answers.observe(tokens)
        self._read.inc(prompt)

    def answered(self, route: str, status: int) -> None:
        """A request to a route was answered."""
        self._http.labels(route, str(status)).inc()

    def text(self, running: int, ready: bool, state: str, transforms: str) -> bytes:
        """All figures as Prometheus reads them."""
        self._running.set(running)
        self._ready.set(ready)
        self._plan.clear()
        self._plan.labels(self._model, state, transforms).set(1)
        return generate_latest(self.registry)
