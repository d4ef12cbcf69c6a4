"""`autotune serve` against tools that others made: `make test-serve`.

1. schemathesis draws requests from the OpenAPI schema of a server over a tiny model: at least 2,000, and no answer may
   be a server error, another one than its schema says, or good for a body that the schema excludes.
2. locust puts 1, 4, 16 and 64 clients on a server over SmolLM2-135M-Instruct after it tuned itself, and times them.
3. aiperf does the same with prompts of its own, and its counts of tokens are those of the server's figures.
4. `/livez` is asked many times a second while a long prompt is read.

Everything is printed; the exit code is 0 if there was no server error, no failed request, no token that was counted
otherwise and no late `/livez`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from autotune.cli import demo
from autotune.serve.keys import VARIABLE
from tests.models import tiny, tiny_tokenizer
from tests.serve.servers import TEMPLATE

# Not positive_data_acceptance: a model's context, vocabulary and chat template decide, too, which bodies are answered.
# The others of schemathesis are about resources that requests make, or headers that they must have; there are none.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)
KEY = "prove"  # of the server that schemathesis asks
DEADLINE_S, ANSWER_S = 5, 30  # after which that server gives 128 long answers up, and schemathesis any request
LEAST_CASES = 2000  # requests of schemathesis without which nothing is proven
ROOT = Path(__file__).parents[2]
READY_S = 900.0  # tuning on two cores takes four minutes
LATE_S = 0.1  # a liveness probe that waits longer is late
LONG_TOKENS, ASK_EVERY_S = 6000, 0.02
PROMPT_TOKENS, NEW_TOKENS = 64, 32  # of aiperf's requests; the chat's template adds some
FINISH_S = 600  # in which answers that aiperf asked for must come when it asks for no further ones
COUNTERS = ("request_success_total", "prompt_tokens_total", "generation_tokens_total")  # of /metrics
COLUMNS = ("tool", "clients", "requests", "TTFT p50, ms", "p99", "between tokens p50, ms", "p99", "tokens/s", "errors")


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
def serving(model: str, *options: str, key: str = "") -> Iterator[str]:
    """Run a server; yields its address once it is ready."""
    command = (sys.executable, "-m", "autotune", "serve", model, *options, "--port", "0")
    environment = os.environ | ({VARIABLE: key} if key else {})
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
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
            while httpx.get(f"{url}/readyz", headers={"X-API-Key": key}, timeout=60).status_code != 200:
                if time.monotonic() > end:
                    raise SystemExit(f"the server was not ready after {READY_S:.0f} s")
                time.sleep(1)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def tell(lines: Iterable[str]) -> None:
    """Print what a server says, but for its lines for each request."""
    for line in lines:
        if not any(f'"message": "{each}"' in line for each in ("request", "answer")):
            print(f"  {line.rstrip()}", flush=True)


def schemathesis(url: str, tools: Path, cases: int) -> bool:
    """Whether schemathesis made enough requests, and found nothing wrong with any answer."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(tools / "st"), "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS), "-n", str(cases)]
        command += ["--header", f"Authorization: Bearer {KEY}", "--phases", "coverage,fuzzing"]
        command += ["--request-timeout", str(ANSWER_S)]
        # Generated keys would hide behind that header, and make many cases of /autotune/events, each read that long.
        command += ["--generation-with-security-parameters", "false"]
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
    times = (first.p50_ms, first.p99_ms, gaps.p50_ms, gaps.p99_ms)
    rate = (first.count + gaps.count) / seconds
    return cells("locust", clients, chat.count, times, rate, chat.failures), chat.count > 0 and chat.failures == 0


def cells(tool: str, clients: int, requests: int, times_ms: Iterable[float], rate: float, errors: int) -> str:
    """A row of the table of `COLUMNS`."""
    parts = [tool, f"{clients}", f"{requests}", *(f"{each:.0f}" for each in times_ms), f"{rate:.0f}", f"{errors}"]
    return "| " + " | ".join(parts) + " |"


def aiperf(url: str, tools: Path, model: str, tokenizer: str, clients: int, seconds: int) -> dict[str, Any]:
    """Return aiperf's own record of so many clients, who ask for chats with synthetic prompts; {} without one.

    Args:
        tokenizer: a folder, by which aiperf makes prompts of so many tokens.
    """
    asked = {"ignore_eos": True, "temperature": 0, "stream_options": {"include_usage": True}}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(tools / "aiperf"), "profile", "--model", model, "--url", url, "--endpoint-type", "chat"]
        command += ["--streaming", "--tokenizer", tokenizer, "--concurrency", str(clients)]
        command += ["--benchmark-duration", str(seconds), "--benchmark-grace-period", str(FINISH_S)]
        command += ["--isl", str(PROMPT_TOKENS), "--osl", str(NEW_TOKENS), "--extra-inputs", json.dumps(asked)]
        command += ["--ui", "none", "--no-gpu-telemetry", "--no-server-metrics", "--artifact-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for file in Path(folder).glob("profile_export_aiperf.json"):
            return dict(json.loads(file.read_text()))
    print(done.stdout[-6000:], done.stderr[-2000:])
    return {}


def totals(lines: Iterable[str]) -> tuple[int, ...]:
    """Read `COUNTERS` from lines of /metrics; those of one name together."""
    found = Counter[str]()
    for line in lines:
        name, _, value = line.removeprefix("autotune:").rpartition(" ")
        if name.split("{")[0] in COUNTERS:
            found[name.split("{")[0]] += int(float(value))
    return tuple(found[name] for name in COUNTERS)


def figures(url: str) -> tuple[int, ...]:
    """`COUNTERS` of a server, once it answers no request."""
    while httpx.get(f"{url}/readyz", timeout=60).json()["running"]:
        time.sleep(0.1)
    return totals(httpx.get(f"{url}/metrics", timeout=60).text.splitlines())


def load(clients: int, found: dict[str, Any], served: Sequence[int]) -> tuple[str, bool]:
    """A row of the table from aiperf's record, and whether it is a proof.

    It is one if each client was answered, no request failed, and each answer has as many tokens as were asked for.

    Args:
        served: how far `COUNTERS` went meanwhile, which must be what aiperf counted: its requests, and the tokens of
            prompts and answers by the usage that came with each answer.
    """

    def figure(name: str, of: str = "avg") -> float:
        return float(found.get(name, {}).get(of, "nan"))

    requests = int(found.get("request_count", {}).get("avg", 0))
    errors = sum(each["count"] for each in found.get("error_summary", ()))
    counted = (requests, figure("total_usage_prompt_tokens"), figure("total_usage_completion_tokens"))
    times = [figure(name, of) for name in ("time_to_first_token", "inter_chunk_latency") for of in ("p50", "p99")]
    text = cells("aiperf", clients, requests, times, figure("output_token_throughput"), errors)
    finished = bool(found.get("is_complete")) and not found.get("was_cancelled") and requests >= clients
    if counted != tuple(served):
        text += f"\naiperf counted {counted} requests, tokens of prompts and of answers, the server {tuple(served)}"
    return text, finished and not errors and counted == tuple(served) and counted[2] == requests * NEW_TOKENS


def liveness(url: str, model: str) -> float:
    """The longest wait for `/livez` while a long prompt is read, seconds; infinite if it was not read."""
    long = {"model": model, "prompt": [5] * LONG_TOKENS, "max_tokens": 1, "temperature": 0}
    answers = list[httpx.Response]()
    reading = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=long, timeout=600))
    )
    reading.start()
    waits = list[float]()
    with httpx.Client(timeout=60) as client:
        while reading.is_alive():
            began = time.perf_counter()
            client.get(f"{url}/livez").raise_for_status()
            waits.append(time.perf_counter() - began)
            time.sleep(ASK_EVERY_S)
    if [answer.status_code for answer in answers] != [200]:
        print(f"the prompt of {LONG_TOKENS} tokens was not read: {[answer.text for answer in answers]}")
        return math.inf
    slowest = max(waits)
    print(f"/livez while {LONG_TOKENS} tokens are read: {len(waits)} answers, the slowest after {slowest * 1e3:.0f} ms")
    return slowest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make test-serve SERVE_ARGS=...", description=__doc__)
    parser.add_argument("--tools", type=Path, default=ROOT / ".venv-serve/bin", help="where st, locust and aiperf are")
    parser.add_argument("--cases", type=int, default=250, help="of schemathesis for each route")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--seconds", type=int, default=30, help="of locust for each number of clients")
    parser.add_argument("--aiperf-seconds", type=int, default=10, help="of aiperf for each number of clients")
    parser.add_argument("--untuned", action="store_true", help="do not tune before the load")
    asked = parser.parse_args(arguments)
    tools = asked.tools.absolute()
    several = [int(each) for each in asked.clients.split(",")]
    by_schema = answers_as_described(tools, asked.cases)
    return 0 if stands_load(tools, several, asked.seconds, asked.aiperf_seconds, asked.untuned) and by_schema else 1


def answers_as_described(tools: Path, cases: int) -> bool:
    """Whether a server over a tiny model does what its OpenAPI schema says."""
    with tempfile.TemporaryDirectory() as folder:
        tiny("llama").save_pretrained(folder)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        with serving(folder, "--untuned", "--deadline", str(DEADLINE_S), key=KEY) as url:
            return schemathesis(url, tools, cases)


def stands_load(tools: Path, several: Sequence[int], locust_s: int, aiperf_s: int, untuned: bool) -> bool:
    """Whether a server over SmolLM2 answers all clients, so many at once, counts rightly, and stays alive meanwhile."""
    model, proofs = str(demo.model_file()), list[bool]()
    with tempfile.TemporaryDirectory() as folder, serving(model, *(["--untuned"] if untuned else [])) as url:
        AutoTokenizer.from_pretrained(Path(model).parent, gguf_file=Path(model).name).save_pretrained(folder)
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        for clients in several:
            text, proven = row(clients, locust(url, tools, name, clients, locust_s), locust_s)
            print(text, flush=True)
            proofs.append(proven)
        for clients in several:
            before = figures(url)
            found = aiperf(url, tools, name, folder, clients, aiperf_s)
            served = [after - earlier for after, earlier in zip(figures(url), before, strict=True)]
            text, proven = load(clients, found, served)
            print(text, flush=True)
            proofs.append(proven)
        proofs.append(liveness(url, name) <= LATE_S)
    return all(proofs)


if __name__ == "__main__":
    sys.exit(main())
