"""The load and its table."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from autotune.cli import main, parser
from autotune.serve import load as loads
from autotune.serve.load import HEADER, Load, Row, Waited, arriving, model_of, percentile, steady, table
from tests.serve.engines import counted
from tests.serve.servers import Running, running, until


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(keys=["key"]) as found:
        yield found


def load(server: Running, key: str | None = "key") -> Load:
    return Load(server.url, "tiny", words=4, tokens=5, key=key)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, 0.0), ([3.0], 99, 3.0), ([1.0, 2.0, 3.0], 50, 2.0), (list(range(101)), 99, 99.0)],
)
def test_percentiles(values: list[float], percent: int, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_a_line_of_the_table_counts_what_came_and_what_failed() -> None:
    waited = [Waited(0.1, (0.01, 0.03), 3), Waited(0.3, (0.02,), 2), Waited(error="HTTP 429"), Waited(error="HTTP 429")]
    assert Row("4", waited, 2.0).cells == ["4", "4", "200", "298", "20.0", "29.8", "2", "2 HTTP 429"]
    assert table([Row("1", waited[:1], 1.0)]).splitlines()[0].count("|") == len(HEADER) + 1
    assert Row("1", waited[:1], 1.0).cells[-1] == "0"


def test_steady_clients_get_all_their_answers(server: Running) -> None:
    row = asyncio.run(steady(load(server), 3, 2))
    assert [each.error for each in row.waited] == [None] * 6
    assert {each.tokens for each in row.waited} == {5}
    assert all(each.first_s > 0 for each in row.waited)


def test_arriving_clients_do_not_wait_for_one_another(server: Running) -> None:
    rows = list[Row]()
    coming = threading.Thread(target=lambda: rows.append(asyncio.run(arriving(load(server), 20.0, 0.5))))
    with counted(server) as turns:
        coming.start()
        until(lambda: server.served.answers.running >= 3)  # none of them has its answer
        turns.open()
        coming.join()
    assert len(rows[0].waited) >= 3
    assert {each.error for each in rows[0].waited} == {None}


def test_refusals_are_counted(server: Running) -> None:
    assert asyncio.run(steady(load(server, key="wrong"), 1, 2)).cells[-1] == "2 HTTP 401"
    nowhere = Load("http://127.0.0.1:9", "tiny")
    assert asyncio.run(steady(nowhere, 1, 1)).cells[-1] == "1 ConnectError"
    assert asyncio.run(model_of(server.url, "key")) == "tiny"


def test_the_command_prints_the_table(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench-serve", f"{server.url}/v1", "--clients", "1,2", "--each", "1", "--tokens", "3", "--api-key", "key"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny at ")
    assert lines[0].endswith(" of 3 tokens")
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["1", "2"]
    for url, said in (("http://127.0.0.1:9", "does not answer"), (server.url, "refuses: HTTP 401: no valid API key; ")):
        assert main(["bench-serve", url]) == 3
        assert said in capsys.readouterr().err


def test_tokens_are_drawn_as_asked(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    body = replace(load(server), temperature=0.5, top_p=0.9).body(random.Random(0))
    assert (body["temperature"], body["top_p"]) == (0.5, 0.9)
    asked = ["--clients", "1", "--each", "1", "--tokens", "2", "--api-key", "key"]
    assert main(["bench-serve", server.url, *asked, "--temperature", "0.5", "--top-p", "0.9"]) == 0
    assert "of 2 tokens, drawn at temperature 0.5, top-p 0.9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "rates", "seconds"),
    [([], [1.0, 2.0, 4.0], 20), (["--rates", "0.5,8", "--seconds", "3"], [0.5, 8.0], 3), (["--clients", "1"], [], 0)],
)
def test_clients_come_at_rates_unless_their_number_is_given(
    given: list[str], rates: list[float], seconds: int, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[float, int]]()

    async def come(load: Load, rate: float, seconds: int) -> Row:
        asked.append((rate, seconds))
        return Row(f"{rate:g} a second", [], 1.0)

    monkeypatch.setattr(loads, "arriving", come)
    assert main(["bench-serve", server.url, "--each", "1", "--tokens", "2", "--api-key", "key", *given]) == 0
    assert asked == [(rate, seconds) for rate in rates]


@pytest.mark.parametrize(
    "given", [["--rates", "0"], ["--rates", "x"], ["--clients", "0"], ["--seconds", "-1"], ["--top-p", "0"]]
)
def test_bad_arguments_are_usage_errors(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["bench-serve", "http://x", *given])
    assert ended.value.code == 4
    assert "above 0" in capsys.readouterr().err
