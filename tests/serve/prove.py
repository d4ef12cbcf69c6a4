"""`autotune serve` against tools that others made: `make test-serve`.

1. schemathesis draws requests from the OpenAPI schema of a server over a tiny model: at least 2,000, and no answer may
   be a server error or another one than its schema says.
2. locust puts 1, 4, 16 and 64 clients on a server over SmolLM2-135M-Instruct after it tuned itself, and times them.
3. `/livez` is asked many times a second while a long prompt is read.

Everything is printed; the exit code is 0 if there was no server error, no failed request and no late `/livez`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from autotune.cli import demo
from tests.models import tiny, tiny_tokenizer
from tests.serve.servers import TEMPLATE

CHECKS = ("--checks", "not_a_server_error,response_schema_conformance", "--phases", "coverage,fuzzing")
LEAST_CASES = 2000  # requests of schemathesis without which nothing is proven
ROOT = Path(__file__).parents[2]
READY_S = 900.0  # tuning on two cores takes four minutes
LATE_S = 0.1  # a liveness probe that waits longer is late
LONG_TOKENS, ASK_EVERY_S = 6000, 0.02
COLUMNS = ("clients", "requests", "TTFT p50, ms", "p99", "between tokens p50, ms", "p99", "tokens/s", "errors")


@dataclass(frozen=True)
class Stats:
    """One name in locust's statistics.

    Args:
        count, failures: of requests.
        p50_ms, p99_ms: of their times.
    """

    count: int
    failures: int
    p50_ms: float
    p99_ms: float


@contextmanager
def serving(*command: str) -> Iterator[str]:
    """Run a server; yields its address once it is ready."""
    with subprocess.Popen((sys.executable, *command, "--port", "0"), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = list[str]()
            for line in process.stderr:
                said.append(line)
                if '"serving"' in line:
                    break
            else:
                raise SystemExit("the server did not start:\n" + "".join(said))
            url = json.loads(line)["url"]
            rest = threading.Thread(target=lambda: tell(process.stderr or ()))
            rest.start()
            end = time.monotonic() + READY_S
            while httpx.get(f"{url}/readyz", timeout=60).status_code != 200:
                if time.monotonic() > end:
                    raise SystemExit(f"the server was not ready after {READY_S:.0f} s")
                time.sleep(1)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def tell(lines: Iterable[str]) -> None:
    """Print what a server says, but for its line for each request."""
    for line in lines:
        if not line.startswith('{"id"'):
            print(f"  {line.rstrip()}", flush=True)


def schemathesis(url: str, tools: Path, cases: int) -> bool:
    """Whether schemathesis made enough requests, and found nothing wrong with any answer."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(tools / "st"), "run", f"{url}/openapi.json", *CHECKS, "-n", str(cases)]
        command += ["--workers", "2", "--continue-on-failure", "--warnings", "off"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    count = generated(done.stdout)
    print(f"schemathesis: {count} requests of at least {LEAST_CASES}, exit code {done.returncode}")
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:])
    return done.returncode == 0 and count >= LEAST_CASES


def generated(said: str) -> int:
    """How many requests schemathesis made, by its own summary."""
    found = re.search(r"^\s*([\d,]+) generated\b", said, re.MULTILINE)
    return int(found.group(1).replace(",", "")) if found else 0


def locust(url: str, tools: Path, model: str, clients: int, seconds: int) -> dict[str, Stats]:
    """Locust's statistics of so many clients, by name."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(__file__).with_name("locust_chat.py")
        command = [str(tools / "locust"), "-f", str(file), "--host", url, "--headless", "-u", str(clients)]
        command += ["-r", str(clients), "-t", f"{seconds}s", "--csv", f"{folder}/load", "--only-summary", "-s", "120"]
        environment = os.environ | {"SERVED_MODEL": model}
        subprocess.run(command, capture_output=True, env=environment, check=False)
        with open(f"{folder}/load_stats.csv", encoding="utf-8") as found:
            return statistics(found)


def statistics(lines: Iterable[str]) -> dict[str, Stats]:
    """Read locust's table of statistics."""
    return {
        row["Name"]: Stats(int(row["Request Count"]), int(row["Failure Count"]), float(row["50%"]), float(row["99%"]))
        for row in csv.DictReader(lines)
        if row["50%"] not in ("", "N/A")
    }


def row(clients: int, found: dict[str, Stats], seconds: int) -> tuple[str, bool]:
    """A row of the table, and whether every request was answered."""
    none = Stats(0, 0, float("nan"), float("nan"))
    chat, first, gaps = (found.get(name, none) for name in ("chat", "TTFT", "between tokens"))
    rate = (first.count + gaps.count) / seconds
    cells = [f"{clients}", f"{chat.count}", f"{first.p50_ms:.0f}", f"{first.p99_ms:.0f}", f"{gaps.p50_ms:.0f}"]
    cells += [f"{gaps.p99_ms:.0f}", f"{rate:.0f}", f"{chat.failures}"]
    return "| " + " | ".join(cells) + " |", chat.count > 0 and chat.failures == 0


def liveness(url: str, model: str) -> float:
    """The longest wait for `/livez` while a long prompt is read, seconds."""
    long = {"model": model, "prompt": [5] * LONG_TOKENS, "max_tokens": 1, "temperature": 0}
    reading = threading.Thread(target=lambda: httpx.post(f"{url}/v1/completions", json=long, timeout=600))
    reading.start()
    waits = list[float]()
    with httpx.Client(timeout=60) as client:
        while reading.is_alive():
            began = time.perf_counter()
            client.get(f"{url}/livez").raise_for_status()
            waits.append(time.perf_counter() - began)
            time.sleep(ASK_EVERY_S)
    print(
        f"/livez while {LONG_TOKENS} tokens are read: {len(waits)} answers, the slowest after {max(waits) * 1e3:.0f} ms"
    )
    return max(waits)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make test-serve SERVE_ARGS=...", description=__doc__)
    parser.add_argument("--tools", type=Path, default=ROOT / ".venv-serve/bin", help="where st and locust are")
    parser.add_argument("--cases", type=int, default=250, help="of schemathesis for each route")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--seconds", type=int, default=30, help="of locust for each number of clients")
    parser.add_argument("--untuned", action="store_true", help="do not tune before the load")
    asked = parser.parse_args(arguments)
    tools = asked.tools.absolute()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        tiny("llama").save_pretrained(folder)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        with serving("-m", "autotune", "serve", folder, "--untuned") as url:
            good &= schemathesis(url, tools, asked.cases)
    command = ["-m", "autotune", "serve", str(demo.model_file()), *(["--untuned"] if asked.untuned else [])]
    with serving(*command) as url:
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        for clients in map(int, asked.clients.split(",")):
            text, answered = row(clients, locust(url, tools, model, clients, asked.seconds), asked.seconds)
            print(text, flush=True)
            good &= answered
        good &= liveness(url, model) <= LATE_S
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
