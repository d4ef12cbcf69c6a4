"""What `make test-serve` takes for a proof: the tables, from locust's and aiperf's statistics, and the rest."""

from __future__ import annotations

import logging
import math
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from autotune.serve.logs import JsonLines
from tests.serve.prove import LEAST_CASES, Stats, generated, liveness, load, row, schemathesis, statistics, tell, totals

HEAD = "Type,Name,Request Count,Failure Count,50%,99%"
LOCUST = [
    HEAD,
    "POST,chat,12,0,900,1500",
    "stream,TTFT,12,0,210,480",
    "stream,between tokens,348,0,5,9",
    ",empty,0,0,N/A,N/A",
]


def test_a_row_is_what_clients_waited() -> None:
    found = statistics(LOCUST)
    assert found["TTFT"] == Stats(12, 0, 210.0, 480.0)
    assert "empty" not in found
    assert row(4, found, 30) == ("| locust | 4 | 12 | 210 | 480 | 5 | 9 | 12 | 0 |", True)


def test_a_load_with_failures_or_without_answers_is_no_proof() -> None:
    failed = statistics([HEAD, "POST,chat,12,1,900,1500"])
    assert row(4, failed, 30)[1] is False
    assert row(4, {}, 30)[1] is False


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("Test cases:\n  1331 generated, 13 found 13 unique failures\n", 1331),
        ("  2,040 generated, 2,040 passed", 2040),
        ("", 0),
    ],
)
def test_requests_are_counted_by_schemathesis_itself(said: str, count: int) -> None:
    assert generated(said) == count


@pytest.mark.parametrize(
    ("cases", "code", "good"), [(LEAST_CASES, 0, True), (LEAST_CASES - 1, 0, False), (LEAST_CASES, 1, False)]
)
def test_too_few_requests_or_a_failure_are_no_proof(
    cases: int, code: int, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], code, f"  {cases} generated, {cases} passed", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert schemathesis("http://x", Path("tools"), 1) is good


def times(p50: float, p99: float) -> dict[str, float]:
    return {"p50": p50, "p99": p99}


AIPERF: dict[str, Any] = {
    "request_count": {"avg": 4.0},
    "time_to_first_token": times(210.0, 480.0),
    "inter_chunk_latency": times(5.0, 9.0),
    "output_token_throughput": {"avg": 12.0},
    "total_usage_prompt_tokens": {"avg": 376.0},
    "total_usage_completion_tokens": {"avg": 128.0},
    "error_summary": [],
    "is_complete": True,
    "was_cancelled": False,
}
SERVED = (4, 376, 128)


def test_what_aiperf_and_the_server_count_alike_is_a_proof() -> None:
    assert load(4, AIPERF, SERVED) == ("| aiperf | 4 | 4 | 210 | 480 | 5 | 9 | 12 | 0 |", True)


@pytest.mark.parametrize(
    ("clients", "change", "served"),
    [
        pytest.param(5, {}, SERVED, id="a client without an answer"),
        pytest.param(4, {"error_summary": [{"count": 1}]}, SERVED, id="a failed request"),
        pytest.param(4, {"was_cancelled": True}, SERVED, id="cancelled"),
        pytest.param(4, {"is_complete": False}, SERVED, id="not complete"),
        pytest.param(4, {}, (5, 376, 128), id="an answer that aiperf did not get"),
        pytest.param(4, {}, (4, 375, 128), id="another count of prompts' tokens"),
        pytest.param(4, {}, (4, 376, 127), id="another count of answers' tokens"),
        pytest.param(4, {"total_usage_completion_tokens": {"avg": 127.0}}, (4, 376, 127), id="an answer that is short"),
    ],
)
def test_what_is_missing_or_counted_otherwise_is_no_proof(
    clients: int, change: dict[str, Any], served: tuple[int, ...]
) -> None:
    assert load(clients, AIPERF | change, served)[1] is False


def test_a_tool_that_wrote_nothing_is_no_proof() -> None:
    text, proven = load(4, {}, (0, 0, 0))
    assert text.startswith("| aiperf | 4 | 0 | nan | nan |")
    assert proven is False


def test_figures_of_one_name_count_together() -> None:
    lines = [
        "# TYPE autotune:request_success_total counter",
        'autotune:request_success_total{finished_reason="length",model_name="x y"} 3.0',
        'autotune:request_success_total{finished_reason="stop",model_name="x y"} 1.0',
        'autotune:prompt_tokens_total{model_name="x y"} 376.0',
        'autotune:generation_tokens_total{model_name="x y"} 128.0',
        'autotune:generation_tokens_created{model_name="x y"} 1.7e9',
    ]
    assert totals(lines) == SERVED


def test_what_a_server_says_is_shown_but_for_its_lines_for_each_request(capsys: pytest.CaptureFixture[str]) -> None:
    form = JsonLines().format
    said = [
        form(logging.makeLogRecord({"msg": each, "fields": {"id": "x"}})) for each in ("request", "answer", "fault")
    ]
    tell([*said, "no JSON\n"])
    assert capsys.readouterr().out == f"  {said[2]}\n  no JSON\n"


@pytest.mark.parametrize("status", [200, 400])
def test_a_prompt_that_is_refused_is_no_proof_that_probes_answer_meanwhile(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = threading.Event()

    def post(*_: Any, **__: Any) -> httpx.Response:
        assert probed.wait(60)
        return httpx.Response(status)

    def get(_: httpx.Client, url: str) -> httpx.Response:
        probed.set()
        return httpx.Response(200, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "post", post)
    monkeypatch.setattr(httpx.Client, "get", get)
    assert math.isfinite(liveness("http://x", "x")) is (status == 200)
