"""Traces by OpenTelemetry, where its SDK is installed and says where they go; otherwise nothing is traced.

A request is a span of the server, child of the caller's (`traceparent`). Each answer is a span below it, with the names
of OpenTelemetry's conventions for generative models.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("autotune.serve")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
TRACED = "/v1/"  # probes and figures are asked for too often to be traced


class AnswerSpan:
    """The span of one answer of the model; does nothing where nothing is traced."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def first_token(self) -> None:
        if self._span is not None:
            self._span.add_event("first token")

    def ended(self, reason: str, prompt: int, tokens: int) -> None:
        """End the span: why the answer ended, and the tokens of prompt and answer."""
        if self._span is not None:
            self._span.set_attribute("gen_ai.response.finish_reasons", [reason])
            self._span.set_attribute("gen_ai.usage.input_tokens", prompt)
            self._span.set_attribute("gen_ai.usage.output_tokens", tokens)
            self._span.end()


class Traces:
    """Makes the spans of one server.

    Args:
        tracer: OpenTelemetry's, or None to trace nothing.
        model: the name that the model is served under.
    """

    def __init__(self, tracer: Any = None, model: str = "") -> None:
        self._tracer = tracer
        self._model = model

    @contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str], request_id: str) -> Iterator[dict[str, Any]]:
        """Enclose a request. What is put into the dictionary becomes an attribute of its span."""
        found: dict[str, Any] = {}
        if self._tracer is None or not path.startswith(TRACED):
            yield found
            return
        from opentelemetry import propagate, trace

        given = {"http.request.method": method, "http.route": path, "autotune.request_id": request_id}
        with self._tracer.start_as_current_span(
            f"{method} {path}", propagate.extract(headers), trace.SpanKind.SERVER, given
        ) as span:
            try:
                yield found
            finally:
                span.set_attributes(found)

    def answer(self) -> AnswerSpan:
        """Begin the span of one answer, below the request's."""
        if self._tracer is None:
            return AnswerSpan()
        attributes = {"gen_ai.request.model": self._model}
        return AnswerSpan(self._tracer.start_span(f"generate {self._model}", attributes=attributes))


def configured(model: str) -> Traces:
    """Traces to where the environment says, by OpenTelemetry's own variables; none if it says nothing."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "")
    wanted = exporter not in ("", "none") or any(name in os.environ for name in ENDPOINTS)
    if not wanted or exporter == "none":
        return Traces()
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        log.warning("nothing is traced: OpenTelemetry's SDK is not installed (pip install autotune-inference[otel])")
        return Traces()
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    if exporter == "console":
        sink: Any = ConsoleSpanExporter()
    else:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            log.warning("nothing is traced: no exporter for OTLP (pip install opentelemetry-exporter-otlp-proto-http)")
            return Traces()
        sink = OTLPSpanExporter()
    service = os.environ.get("OTEL_SERVICE_NAME", "autotune")
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(sink))
    trace.set_tracer_provider(provider)
    return Traces(provider.get_tracer("autotune"), model)
