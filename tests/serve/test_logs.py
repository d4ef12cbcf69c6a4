"""The server's log: every line on standard error is a JSON object, with the id of its request."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest

from autotune.report.progress import Elapsed, Lines
from autotune.serve import logs
from tests.models import tiny, tiny_tokenizer
from tests.serve.servers import until

FAULTS = """
import sys, threading, warnings
from autotune.cli import main
from autotune.serve.prompts import Prompts

whole = Prompts.of_completion

def broken(prompts, body):
    if body.prompt != ["break"]:
        return whole(prompts, body)
    warnings.warn("autotune: something odd", RuntimeWarning)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    raise RuntimeError("a fault of the server")

Prompts.of_completion = broken
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a process logs that answers, fails, is asked by probes and by somebody who does not speak HTTP, and ends."""
    folder = tmp_path_factory.mktemp("logs")
    tiny("llama").save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    command = [sys.executable, "-c", FAULTS, "serve", str(folder / "tiny"), "--untuned", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "AUTOTUNE_API_KEY": "secret-key"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            found = list[str]()
            while '"serving"' not in (found or [""])[-1]:
                found.append(process.stderr.readline())
                assert found[-1], found
            url = json.loads(found[-1])["url"]
            with httpx.Client(base_url=url, headers={"X-API-Key": "secret-key"}, timeout=60) as client:
                until(lambda: client.get("/readyz").status_code == 200)
                for probe in ("/livez", "/health", "/metrics"):
                    client.get(probe)
                httpx.get(f"{url}/metrics")  # without the key
                body = {"prompt": "hi", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
                client.post("/v1/completions", json=body, headers={"X-Request-ID": "good"}).raise_for_status()
                failed = client.post("/v1/completions", json={"prompt": "break"}, headers={"X-Request-ID": "bad"})
                assert failed.status_code == 500
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as other:
                other.sendall(b"\x16\x03 is not HTTP\r\n\r\n")
                other.recv(1000)
            process.send_signal(signal.SIGTERM)
            found += process.stderr.read().splitlines()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert "secret-key" not in "".join(found)
    return [json.loads(line) for line in found]


def of(lines: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    return [line for line in lines if all(line.get(name) == value for name, value in fields.items())]


def test_every_line_has_a_time_a_level_and_a_message(lines: list[dict[str, Any]]) -> None:
    assert all(line["time"].endswith("+00:00") and line["message"] for line in lines)
    assert {line["level"] for line in lines} == {"info", "warning", "error"}


def test_an_answer_is_a_line_with_its_figures(lines: list[dict[str, Any]]) -> None:
    (answer,) = of(lines, message="answer", id="good")
    assert answer["response"].startswith("cmpl-")
    assert (answer["completion_tokens"], answer["finish_reason"]) == (3, "length")
    assert answer["prompt_tokens"] > 0
    assert 0 < answer["ttft_s"] <= answer["seconds"]
    (request,) = of(lines, message="request", id="good")
    assert (request["method"], request["path"], request["status"]) == ("POST", "/v1/completions", 200)


def test_a_fault_has_its_traceback_in_a_line_with_the_request_s_id(lines: list[dict[str, Any]]) -> None:
    (fault,) = [line for line in lines if "a fault of the server" in line.get("traceback", "")]
    assert (fault["id"], fault["level"]) == ("bad", "error")
    assert "Traceback (most recent call last)" in fault["traceback"]
    (request,) = of(lines, message="request", id="bad")
    assert request["status"] == 500


def test_what_others_say_is_a_line_too(lines: list[dict[str, Any]]) -> None:
    assert of(lines, message="autotune: something odd", level="warning")
    assert of(lines, message="Invalid HTTP request received.", level="warning")
    assert [line for line in lines if "ZeroDivisionError" in line.get("traceback", "")]
    assert of(lines, ending="SIGTERM")


def test_probes_are_lines_only_when_they_are_refused(lines: list[dict[str, Any]]) -> None:
    probes = [line for line in lines if line.get("path") in ("/livez", "/readyz", "/health", "/metrics")]
    assert {line["path"] for line in probes if line["status"] < 400} == set()
    assert of(probes, path="/metrics", status=401)


def test_steps_of_tuning_are_lines(caplog: pytest.LogCaptureFixture) -> None:
    progress = Lines(logs.Steps(), Elapsed())
    progress.update("trying something")
    progress.update("trying something else")
    fields = [vars(record)["fields"] for record in caplog.records if record.message == "tuning"]
    assert [each["step"].partition("] ")[2] for each in fields] == ["trying something", "trying something else"]


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_is_the_least_that_is_written(level: str, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:], logs.log.level, warnings.showwarning, threading.excepthook
    undo = logs.install(level)
    try:
        for each in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logs.event("x", each, number=each)
    finally:
        undo()
    written = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["number"] for line in written] == [10, 20, 30, 40][4 - shown :]
    assert (logging.getLogger().handlers, logs.log.level, warnings.showwarning, threading.excepthook) == before
