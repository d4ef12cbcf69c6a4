"""The figures for Prometheus: which there are, what they count, and what they leave alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from autotune.errors import QueueFullError
from autotune.runtime.batching.load import EngineLoad
from autotune.serve import logs
from autotune.serve.exposition import Snapshot, Total
from autotune.serve.metrics import Metrics
from autotune.serve.run import answer_once
from autotune.serve.timing import AnswerTimes
from tests.serve.servers import Running, running

HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "step_rows",
}
COUNTERS = {
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "request_success",
    "request_unfinished",
    "admission_rejections",
    "bypassed",
    "http_requests",
}
GAUGES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "ready",
    "plan_info",
    "plan_breaker_open",
}
PROCESS = {
    "process_virtual_memory_bytes",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_cpu_seconds",
    "process_open_fds",
    "process_max_fds",
}
OF_FINISHED = [  # figures that only a finished answer changes
    "request_success_total",
    "e2e_request_latency_seconds_count",
    "request_time_per_output_token_seconds_count",
    "request_queue_time_seconds_count",
    "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count",
    "request_prompt_tokens_count",
    "request_generation_tokens_count",
    "prompt_tokens_total",
]
ASK = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def samples(server: Running) -> dict[str, float]:
    """Every figure, with its labels but for the model's."""
    found = dict[str, float]()
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sample.labels.items() if key != "model_name")
            found[sample.name.removeprefix("autotune:") + (f"[{labels}]" if labels else "")] = sample.value
    return found


def total(found: dict[str, float], name: str) -> float:
    return sum(value for key, value in found.items() if key.split("[")[0] == name)


def test_these_are_all_the_figures(server: Running) -> None:
    found = dict[str, str]()
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        if not family.name.endswith("_created"):
            found[family.name] = family.type
    own = {name.removeprefix("autotune:"): kind for name, kind in found.items() if name.startswith("autotune:")}
    expected = [(HISTOGRAMS, "histogram"), (COUNTERS, "counter"), (GAUGES, "gauge")]
    assert own == {name: kind for names, kind in expected for name in names}
    assert {name for name in found if not name.startswith("autotune:")} == PROCESS


def test_a_finished_answer_is_in_every_figure(server: Running) -> None:
    before = samples(server)
    assert httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60).status_code == 200
    after = samples(server)
    gained = {name: total(after, name) - total(before, name) for name in OF_FINISHED}
    assert gained == dict.fromkeys(OF_FINISHED, 1) | {"prompt_tokens_total": 3}
    assert (
        after["request_success_total[finished_reason=length]"] > before["request_success_total[finished_reason=length]"]
    )
    assert total(after, "request_unfinished_total") == total(before, "request_unfinished_total")
    parts = ("request_queue_time", "request_prefill_time", "request_decode_time")
    whole = after["e2e_request_latency_seconds_sum"] - before["e2e_request_latency_seconds_sum"]
    assert whole == pytest.approx(sum(after[f"{each}_seconds_sum"] - before[f"{each}_seconds_sum"] for each in parts))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(QueueFullError("256 wait"), "rejected"), (RuntimeError("broken"), "error"), (None, "deadline")],
)
def test_what_is_not_finished_is_counted_apart(
    fault: Exception | None, reason: str, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = samples(server)
    if fault is None:
        monkeypatch.setattr(server.served.answers, "deadline_s", 1e-6)
    else:

        def fail(*_: Any, **__: Any) -> None:
            raise fault

        handle = SimpleNamespace(submit=fail, waiting=0)
        monkeypatch.setattr(server.served.answers, "model", SimpleNamespace(autotune=handle))
    for stream in (True, False):
        answer = httpx.post(f"{server.url}/v1/completions", json=ASK | {"stream": stream})
        assert '"error"' in answer.text
    monkeypatch.undo()
    after = samples(server)
    name = f"request_unfinished_total[reason={reason}]"
    assert after[name] - before.get(name, 0.0) == 2
    assert {each: total(after, each) for each in OF_FINISHED} == {each: total(before, each) for each in OF_FINISHED}


def test_the_first_token_s_time_begins_with_the_request_s_arrival(server: Running) -> None:
    async def late() -> None:
        logs.CURRENT.set(logs.RequestContext("late", time.monotonic() - 1000.0))
        await answer_once(server.served)

    before = samples(server)
    asyncio.run(late())
    after = samples(server)
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds", "e2e_request_latency_seconds"):
        assert after[f"{name}_sum"] - before[f"{name}_sum"] > 1000.0
    assert after["request_prefill_time_seconds_sum"] - before["request_prefill_time_seconds_sum"] < 1000.0


def test_times_of_an_answer_add_up() -> None:
    times = AnswerTimes(10.0)
    assert (times.ttft_s, times.queue_s, times.prefill_s, times.decode_s, times.tpot_s) == (None,) * 5
    times.begun_s = 12.0
    assert [times.token(now_s) for now_s in (15.0, 16.0, 18.0)] == [5.0, 1.0, 2.0]
    assert (times.ttft_s, times.queue_s, times.prefill_s, times.decode_s, times.tpot_s) == (5.0, 2.0, 3.0, 3.0, 1.5)
    one = AnswerTimes(0.0, 0.0)
    one.token(1.0)
    assert (one.decode_s, one.tpot_s) == (0.0, None)


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models/tiny", "/v1/models/{name:path}"),
        ("/v1/models/owner/name-1.5", "/v1/models/{name:path}"),
        ("/v1/nowhere", "other"),
        ("/favicon.ico", "other"),
    ],
)
def test_a_request_is_counted_by_its_route(path: str, route: str, server: Running) -> None:
    def count() -> float:
        return sum(
            value for key, value in samples(server).items() if key.startswith(f"http_requests_total[route={route},")
        )

    before = count()
    httpx.get(server.url + path)
    assert count() == before + 1


def test_what_is_read_of_the_engine() -> None:
    metrics = Metrics("tiny")
    loads = [
        EngineLoad(3, 0.25, 300, 128, {1: 10, 4: 5}),
        EngineLoad(0, 0.0, 400, 128, {1: 12, 4: 5, 8: 1}),
        EngineLoad(),  # rolled back
        EngineLoad(0, 0.0, 400, 128, {1: 12, 4: 5, 8: 1}),  # the same plan again
        EngineLoad(0, 0.5, 50, 0, {2: 3}),  # another one
    ]
    for load in loads:
        now = Snapshot(2, 3, True, "tuned", "a, b", resting=True, bypassed={"a batch": 7}, load=load)
        text = metrics.text(now).decode()
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    own = 'model_name="tiny"'
    expected = {
        f"num_requests_running{{{own}}}": 2,
        f"num_requests_waiting{{{own}}}": 3,
        f"kv_cache_usage_perc{{{own}}}": 0.5,
        f"plan_breaker_open{{{own}}}": 1,
        f'plan_info{{{own},state="tuned",transforms="a, b"}}': 1,
        f'bypassed_total{{{own},reason="a batch"}}': 7,
        f"prefix_cache_queries_total{{{own}}}": 450,
        f"prefix_cache_hits_total{{{own}}}": 128,
        f'step_rows_bucket{{le="1",{own}}}': 12,
        f'step_rows_bucket{{le="2",{own}}}': 15,
        f'step_rows_bucket{{le="4",{own}}}': 20,
        f'step_rows_bucket{{le="+Inf",{own}}}': 21,
        f"step_rows_count{{{own}}}": 21,
        f"step_rows_sum{{{own}}}": 12 + 2 * 3 + 4 * 5 + 8,
    }
    assert {name: found.get(f"autotune:{name}") for name in expected} == expected


def test_a_total_goes_on_when_its_count_begins_again() -> None:
    counted = Total()
    assert [counted.follow(count) for count in (5, 7, 0, 7, 8, 2, 3)] == [5, 7, 7, 7, 8, 10, 11]
