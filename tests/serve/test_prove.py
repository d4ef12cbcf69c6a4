"""The table of `make test-serve`, from locust's statistics."""

from __future__ import annotations

from tests.serve.prove import Stats, row, statistics

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
