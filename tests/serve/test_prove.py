"""The table of `make test-serve`, from locust's statistics."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.serve.prove import LEAST_CASES, Stats, generated, row, schemathesis, statistics

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
    assert row(4, found, 30) == ("| 4 | 12 | 210 | 480 | 5 | 9 | 12 | 0 |", True)


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
