"""Spans of requests and answers, as OpenTelemetry's own SDK collects them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from autotune.serve import traces
from tests.serve.servers import Running, running, until

ASK = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def server(spans: InMemorySpanExporter) -> Iterator[Running]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with running(traces=traces.Traces(provider.get_tracer("test"), "tiny")) as found:
        spans.clear()  # the first request, which the server makes itself
        yield found


def asked(server: Running, spans: InMemorySpanExporter, **change: Any) -> tuple[httpx.Response, list[Any]]:
    """An answer and the spans that it left, by their end."""
    spans.clear()
    got = httpx.post(f"{server.url}/v1/completions", json=ASK | change, headers={"traceparent": PARENT}, timeout=60)
    until(lambda: any(span.name == "POST /v1/completions" for span in spans.get_finished_spans()))
    return got, list(spans.get_finished_spans())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_a_span_below_its_request_s(stream: bool, server: Running, spans: InMemorySpanExporter) -> None:
    got, found = asked(server, spans, stream=stream)
    answer, request = found
    assert (answer.name, request.name) == ("generate tiny", "POST /v1/completions")
    assert answer.parent.span_id == request.context.span_id
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert f"{request.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert [event.name for event in answer.events] == ["first token"]
    assert dict(answer.attributes) == {
        "gen_ai.request.model": "tiny",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
    }
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["autotune.request_id"] == got.headers["x-request-id"]


def test_answers_to_one_prompt_are_spans_of_their_own(server: Running, spans: InMemorySpanExporter) -> None:
    _, found = asked(server, spans, n=3, temperature=1)
    assert [span.name for span in found].count("generate tiny") == 3


def test_a_refusal_is_a_request_without_an_answer(server: Running, spans: InMemorySpanExporter) -> None:
    _, found = asked(server, spans, max_tokens=0)
    assert [(span.name, span.attributes["http.response.status_code"]) for span in found] == [
        ("POST /v1/completions", 400)
    ]


def test_probes_are_not_traced(server: Running, spans: InMemorySpanExporter) -> None:
    spans.clear()
    for route in ("livez", "readyz", "metrics"):
        httpx.get(f"{server.url}/{route}")
    assert not spans.get_finished_spans()


@pytest.mark.parametrize(
    ("environment", "traced", "warned"),
    [
        ({}, False, ""),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}, False, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}, False, "no exporter for OTLP"),
        ({"OTEL_TRACES_EXPORTER": "console"}, True, ""),
    ],
)
def test_the_environment_says_where_traces_go(
    environment: dict[str, str],
    traced: bool,
    warned: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = InMemorySpanExporter()
    monkeypatch.setattr("opentelemetry.sdk.trace.export.ConsoleSpanExporter", lambda: sink)
    for name in ("OTEL_TRACES_EXPORTER", *traces.ENDPOINTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    found = traces.configured("tiny")
    assert (found._tracer is not None) is traced
    assert warned in caplog.text
    if traced:
        from opentelemetry import trace

        found.answer().ended("stop", 1, 2)
        trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
        assert [span.name for span in sink.get_finished_spans()] == ["generate tiny"]


def test_without_the_sdk_nothing_is_traced_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert traces.configured("tiny")._tracer is None
    assert "autotune-inference[otel]" in caplog.text
