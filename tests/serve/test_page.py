"""The page at `/`: what it shows is the server's, changes with it, is nobody else's, and switches the plan."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

from autotune.errors import PackageError
from autotune.live.status import State, Status
from autotune.report import Report
from autotune.report.html import drawing
from autotune.report.progress import Doing
from autotune.runtime.variant import Variant
from autotune.serve import page
from autotune.serve.metrics import MOST_RECENT, Metrics, Percentiles, Recent
from autotune.serve.page.chapters import chapters
from autotune.serve.page.view import reasons
from autotune.serve.refusal import Refusal
from autotune.serve.timing import AnswerTimes
from autotune.serve.watching import MOST_LINES, Feed, Reading, TuningLine, TuningLog, figures, may
from autotune.transforms.lean_loop import LeanLoop
from autotune.tune import plan as plans
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.plan import Trial, TrialOutcome
from autotune.tune.record import report_of
from autotune.tune.tuned import Tuned
from tests import chromium, pages
from tests.models import token_prompts
from tests.report.test_html import LOOK, needs_chromium
from tests.report.test_report import COMMITTED, FASTER, PASSED, TRIALS
from tests.serve.engines import WAIT_S
from tests.serve.servers import Running, running, until

PROMPT = token_prompts(1, length=12)[0]
BODY = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}
KEY = {"Authorization": "Bearer key-1"}
FILES = ["/", "/page.css", "/page.js", "/icon.svg"]
DATA = ["/autotune", "/autotune/events", "/autotune/chapters", "/autotune/report"]
WORDS = "2.50x faster"
IDLE = dict.fromkeys(("tokens_per_s", "running", "waiting", "ttft_ms", "inter_token_ms"), None) | {"t": 0}
LOOP = str(LeanLoop())
MOST_SAMPLES = 30  # one a second
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def won(reason: str = WORDS) -> Report:
    """A report whose plan is a lean loop."""
    step = "a leaner loop"
    trial = Trial(LeanLoop(), step, "decode", TrialOutcome.ACCEPTED, reason, 3.1, PASSED, FASTER, 42.0, 13.0)
    return report_of(replace(COMMITTED, transforms=(LeanLoop(),), trials=(trial, *TRIALS[1:])))


@contextmanager
def tuned(report: Report | None = None, **options: Any) -> Iterator[Running]:
    """A server whose model was tuned without a search: a lean loop serves."""

    def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, notify: Any, **_: Any) -> Tuned:
        notify(f"trying {LOOP}")
        notify(Doing("confirming it", 0.5))
        variant = Variant(model, traffic, workload).with_transforms([LeanLoop()])
        plan = plans.Plan(Fingerprint("", "", {}, "", "", "strict"), variant.transforms)
        return Tuned(variant, plan, report or won(), "won")

    with running(**options) as server, mock.patch.object(tuning, "tune", tune):
        server.model.autotune.tune(token_prompts(2))
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with tuned() as found:
        yield found


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with tuned(keys=["key-1", "key-2"]) as found:
        yield found


@pytest.fixture(autouse=True)
def committed(request: pytest.FixtureRequest) -> None:
    """The plan serves at the start of each test."""
    for name in {"server", "locked"} & set(request.fixturenames):
        request.getfixturevalue(name).model.autotune.commit()


def events(server: Running, **options: Any) -> Iterator[tuple[str, Any]]:
    """The events of the stream, with their names."""
    with httpx.stream("GET", f"{server.url}/autotune/events", timeout=60, **options) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = "message"
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])
                name = "message"


def samples(server: Running, **options: Any) -> Iterator[Any]:
    return (data for name, data in events(server, **options) if name == "message")


def first(stream: Iterator[Any], wanted: Callable[[Any], bool]) -> Any:
    """The first sample that is wanted, among so many that it must have come."""
    for count, sample in enumerate(stream):
        if wanted(sample):
            return sample
        assert count < MOST_SAMPLES, f"it never came: {sample}"
    raise AssertionError("the stream ended")


def ask(server: Running, body: dict[str, Any] = BODY, **options: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, **options)


# figures


def test_figures_come_as_events_and_change_with_requests(server: Running) -> None:
    stream = samples(server)
    before = next(stream)
    assert ask(server).status_code == 200
    later: list[Any] = []

    def is_counted(sample: Any) -> bool:
        later.append(sample)
        return bool(sample["served"] > before["served"])

    second = first(stream, is_counted)
    assert second["t"] > before["t"]
    assert second["tokens"] == before["tokens"] + 8
    assert second["served"] == before["served"] + 1
    assert second["answers"]["length"] == before["answers"].get("length", 0) + 1
    assert 0 < second["ttft_ms"]["p50"] <= second["ttft_ms"]["p99"]
    assert 0 < second["inter_token_ms"]["p50"] <= second["inter_token_ms"]["p99"]
    assert max(sample["tokens_per_s"] for sample in later) > 0
    assert next(stream)["tokens_per_s"] == 0


def test_errors_are_counted(server: Running) -> None:
    stream = samples(server)
    before = next(stream)
    assert ask(server, {"prompt": [5], "no_such_field": 1}).status_code == 400
    assert httpx.get(f"{server.url}/nowhere").status_code == 404  # none of the model's routes
    after = first(stream, lambda sample: sample["failed"] != before["failed"])
    assert after["failed"]["4xx"] == before["failed"].get("4xx", 0) + 1


def test_requests_that_run_and_that_wait_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    with running() as server:
        forward = server.model.lm_head.forward

        def late(*args: Any, **kwargs: Any) -> Any:
            assert held.wait(60)
            return forward(*args, **kwargs)

        monkeypatch.setattr(server.model.lm_head, "forward", late)
        stream = samples(server)
        asking = [threading.Thread(target=ask, args=(server,)) for _ in range(3)]
        for thread in asking:
            thread.start()
        try:
            # nothing decodes them together; before the first begins, all three wait
            first(stream, lambda sample: (sample["running"], sample["waiting"]) == (1, 2))
            text = httpx.get(f"{server.url}/metrics").text
            assert 'autotune:num_requests_waiting{model_name="tiny"} 2.0' in text
            assert 'autotune:num_requests_running{model_name="tiny"} 1.0' in text
        finally:
            held.set()
            for thread in asking:
                thread.join()
        assert first(stream, lambda sample: not sample["running"])["waiting"] == 0


def test_who_comes_later_gets_what_was_before(server: Running) -> None:
    watching = samples(server)
    seen = [next(watching)["t"] for _ in range(2)]
    name, past = next(events(server))
    assert name == "history"
    assert [sample["t"] for sample in past][-2:] == seen
    assert "detail" not in past[-1]  # only what the charts draw


def test_all_who_watch_share_the_samples() -> None:
    async def check() -> None:
        made = itertools.count()
        feed = Feed(lambda _: IDLE | {"t": next(made)}, 0.01)
        streams = [feed.events() for _ in range(5)]
        for stream in streams:
            await anext(stream)
        for count in range(3):
            got = await asyncio.gather(*map(anext, streams))
            assert [json.loads(event[6:])["t"] for event in got] == [count] * 5
        for stream in streams:
            await stream.aclose()

    asyncio.run(check())


def test_no_sample_is_made_for_nobody(server: Running) -> None:
    streams = [samples(server) for _ in range(3)]
    for stream in streams:
        next(stream)
    assert server.served.feed.watchers >= 3
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    until(lambda: server.served.feed.watchers == 0)
    assert server.served.feed._task is None


def test_a_watcher_that_goes_leaves_no_task() -> None:
    async def check() -> None:
        feed = Feed(lambda _: IDLE, 0.01)
        streams = [feed.events() for _ in range(3)]
        for stream in streams:
            assert (await anext(stream)).startswith(b"event: history")
            assert b'"t": 0' in await anext(stream)
        for left, stream in enumerate(streams, 1):
            await stream.aclose()
            assert feed.watchers == 3 - left
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(check())


def test_streams_end_with_the_feed_and_with_a_sample_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        def fail(before: Any) -> Any:
            raise RuntimeError("no figures")

        feed = Feed(fail, 0.01)
        assert len([event async for event in feed.events()]) == 1  # the past alone
        assert (feed.watchers, feed._task) == (0, None)
        feed = Feed(lambda _: IDLE, 0.01, most=1)
        stream = feed.events()
        await anext(stream)
        with pytest.raises(Refusal, match="1 pages watch this server, the most"):
            await anext(feed.events())
        feed.end()
        assert [event async for event in stream] == []
        with pytest.raises(Refusal, match="the server is ending"):
            await anext(feed.events())

    asyncio.run(check())
    assert "no figures" in caplog.text


def test_a_page_that_watches_does_not_hold_up_the_end() -> None:
    with running() as server:
        stream = samples(server)
        next(stream)
        server.server.handle_exit(15, None)
        assert len(list(stream)) < 5  # it ends
        until(lambda: not server.server.server_state.connections)
        assert not server.server.force_exit


def test_percentiles_are_of_the_last_minute() -> None:
    now = [0.0]
    recent = Recent(clock=lambda: now[0])
    assert recent.percentiles() is None
    recent.add(9.0)
    now[0] = 30.0
    for k in range(1, 101):
        recent.add(k / 1000)
    assert recent.percentiles() == Percentiles(0.051, 0.1)
    assert recent.per_s() == 101 / 30.0
    now[0] = 61.0
    assert recent.percentiles() == Percentiles(0.05, 0.099)
    now[0] = 91.0
    assert recent.percentiles() is None
    for _ in range(2 * MOST_RECENT):
        recent.add(1.0)
    assert len(recent._values) == MOST_RECENT


def test_the_page_counts_what_prometheus_counts() -> None:
    metrics = Metrics("tiny")
    metrics.token(0.2, first=True)
    metrics.token(0.01, first=False)
    metrics.finished("stop", 5, AnswerTimes(0.0, 0.1, 0.2, 0.3, 2))
    metrics.unfinished("abort")
    metrics.rejections.inc()
    for status in (200, 400, 408, 429, 499):  # late, refused and given up are among the answers
        metrics.answered("/v1/completions", status)
    for route, status in (("/metrics", 401), ("/v1/models", 500)):
        metrics.answered(route, status)
    found = metrics.counts()
    assert (found.tokens, found.answers, found.refused) == (2, {"stop": 1, "abort": 1}, 1)
    assert found.failed == {"4xx": 1, "5xx": 1}
    assert metrics.first.percentiles() == Percentiles(0.2, 0.2)
    assert metrics.next.percentiles() == Percentiles(0.01, 0.01)


@pytest.mark.parametrize(("passed_s", "rate"), [(1.0, 30.0), (2.0, 15.0), (60.0, None)])
def test_a_rate_needs_a_sample_shortly_before(passed_s: float, rate: float | None) -> None:
    counts = Metrics("tiny").counts()
    status = Status(State.WAITING, "tuning starts with .tune()")
    reading = Reading(5.0 + passed_s, status, None, 0, None, 0, 0, replace(counts, tokens=50), None, None)
    assert figures(reading, {"t": 5.0, "tokens": 20})["tokens_per_s"] == rate
    assert figures(reading, None)["tokens_per_s"] is None


# the plan, and why


def test_the_overview_has_the_plan_with_its_reasons(server: Running) -> None:
    found = httpx.get(f"{server.url}/autotune").json()
    assert (found["model"], found["state"]) == ("tiny", "tuned")
    assert found["plan"] == {
        "serves": True,
        "transforms": [{"name": LOOP, "reasons": ["Accepted: 2.50x faster."]}],
    }
    assert "a whole request" in found["lead"]
    assert [title for title, *_ in found["tiles"]][:2] == ["decode, per token", "prefill, to the first token"]
    assert [line["text"] for line in found["lines"]] == [f"trying {LOOP}", "confirming it"]


def test_the_chapters_are_the_reports_without_styles_in_markup(server: Running) -> None:
    found = httpx.get(f"{server.url}/autotune/chapters", timeout=60).json()
    assert [chapter["id"] for chapter in found] == ["limits", "trials"]
    limits, trials = (pages.parse(chapter["html"]) for chapter in found)
    for told in ("decode moves 538 MB a token at 10.0 GB/s", "prefill computes 17 GFLOP at 130 GFLOP/s"):
        assert told.capitalize()[:10] in limits.text
        assert told[1:] in limits.text
    assert len(limits.all("svg")) == 2
    assert LOOP in {row[0] for row in trials.rows("Everything that was considered")}
    nodes = [*limits.all(), *trials.all()]
    assert [node for node in nodes if "style" in node.attributes] == []
    assert [node for node in nodes if "data-style" in node.attributes]


def test_without_matplotlib_the_chapters_are_sentences_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise PackageError("the charts need matplotlib")

    monkeypatch.setattr(drawing, "_svg", missing)
    limits, trials = (pages.parse(chapter["html"]) for chapter in chapters(won().to_dict()))
    assert "538 MB a token" in limits.text
    assert "the charts need matplotlib" in limits.text
    assert "mean KLD 1.21" in trials.text


def test_the_whole_report_is_downloaded(server: Running) -> None:
    answer = httpx.get(f"{server.url}/autotune/report", timeout=60)
    assert answer.headers["content-disposition"] == 'attachment; filename="report.html"'
    assert pages.parse(answer.text).data()["transforms"] == [LOOP]


def test_a_reason_is_that_of_the_trial_that_accepted_it_last() -> None:
    names = {"alone": "a@decode", "both": "a@decode + b@prefill", "later": "a@decode + c@both instead of b@prefill"}
    trials = [{"candidate": name, "outcome": "accepted", "reason": why} for why, name in names.items()]
    trials.append({"candidate": "a@decode", "outcome": "rejected", "reason": "slower"})
    share = {"ratio": 2.25, "low": 2.125, "high": 2.5}
    unknown = {"transform": "c@both", "target": "both", "speedup": None, "reason": "the budget had no time for it"}
    measured = {"transform": "b@prefill", "target": "prefill", "speedup": share, "reason": ""}
    record = {"trials": trials, "contributions": [measured, unknown]}
    status = Status(State.TUNED, "")
    assert list(reasons("a@decode", record, status)) == ["Accepted together with 1 other: later."]
    assert list(reasons("b@prefill", record, status)) == [
        "Accepted together with 1 other: both.",
        "With it, prefill is 2.25x (2.12-2.50x) as fast as without it.",
    ]
    assert (
        list(reasons("c@both", record, status))[1] == "Its own share was not measured: the budget had no time for it."
    )
    assert "kept from an earlier tuning" in next(reasons("d@both", record, status))
    assert "tuning goes on" in next(reasons("a@decode", None, Status(State.TUNING, "")))


def test_before_tuning_there_is_a_page_without_a_plan() -> None:
    with running() as server:
        found = httpx.get(f"{server.url}/autotune").json()
        assert (found["plan"], found["tiles"], found["has_report"]) == ({"serves": False, "transforms": []}, [], False)
        assert found["lead"] == "Tuning starts with .tune()."
        assert httpx.get(f"{server.url}/autotune/chapters").json() == []
        for route in ("rollback", "commit"):
            answer = httpx.post(f"{server.url}/autotune/{route}", headers=JSON)
            assert answer.status_code == 409
            assert "the model is waiting" in answer.json()["error"]["message"]
        assert httpx.get(f"{server.url}/autotune/report").status_code == 409


def test_lines_of_tuning_are_kept_and_the_share_of_the_latest() -> None:
    now = [10.0]
    log = TuningLog(clock=lambda: now[0])
    now[0] = 12.0
    log.update(Doing("reading", 0.25))
    now[0] = 14.0
    log.update(Doing("reading", 0.75))
    log.update("trying")
    assert log.lines() == (TuningLine(2.0, "reading", 0.75), TuningLine(4.0, "trying"))
    for k in range(2 * MOST_LINES):
        log.update(f"step {k}")
    assert len(log.lines()) == MOST_LINES
    assert log.count == 2 * MOST_LINES + 2


def test_a_trial_is_shown_while_it_runs() -> None:
    found: list[Any] = []
    with running() as new:

        def tune(*_: Any, notify: Any, **__: Any) -> None:
            notify(Doing("trying x", 0.4))
            found.append(httpx.get(f"{new.url}/autotune").json())
            found.append(next(samples(new))["step"])
            found.append(switch(new, "commit"))
            raise MemoryError

        with mock.patch.object(tuning, "tune", tune), pytest.raises(MemoryError):
            new.model.autotune.tune(token_prompts(2))
    overview, step, answer = found
    assert overview["state"] == "tuning"
    assert overview["lead"] == "A plan is searched for. Meanwhile the model serves with the original."
    assert [line["text"] for line in overview["lines"]] == ["trying x"]
    assert step == {"text": "trying x", "share": 0.4}
    assert answer.status_code == 409
    assert "tuning is under way" in answer.json()["error"]["message"]


# switching


def switch(server: Running, to: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/autotune/{to}", headers=JSON | headers)


def test_rolling_back_and_forth_changes_what_serves_and_no_answer(server: Running) -> None:
    handle = server.model.autotune
    before = handle.status.served
    expected = ask(server).json()["choices"]
    until(lambda: handle.status.served > before)  # the answer is sent before its call is counted
    served = before + 1
    found = switch(server, "rollback").json()
    assert (found["state"], found["plan"]["serves"], found["may"]) == (
        "rolled back",
        False,
        {"rollback": False, "commit": True},
    )
    assert [each["name"] for each in found["plan"]["transforms"]] == [LOOP]  # it may come back
    assert ask(server).json()["choices"] == expected
    assert handle.status.served == served
    assert switch(server, "rollback").status_code == 200  # once more changes nothing
    found = switch(server, "commit").json()
    assert (found["state"], found["plan"]["serves"], found["may"]) == (
        "tuned",
        True,
        {"rollback": True, "commit": False},
    )
    assert ask(server).json()["choices"] == expected
    until(lambda: handle.status.served == served + 1)
    assert switch(server, "commit").status_code == 200


def test_switching_under_load_changes_no_answer(server: Running) -> None:
    expected = ask(server).json()["choices"][0]["text"]
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.extend(ask(server).json()["choices"][0]["text"] for _ in range(20)))
    asking.start()
    while asking.is_alive():
        assert switch(server, "rollback").status_code == switch(server, "commit").status_code == 200
    asking.join()
    assert found == [expected] * 20


def test_a_plan_that_is_stale_is_not_committed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    switch(server, "rollback")
    monkeypatch.setattr(server.model.autotune._serving, "change", lambda: "a weight was written to")
    answer = switch(server, "commit")
    assert answer.status_code == 409
    assert "the plan is stale: a weight was written to" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("state", "serves", "has_plan", "rollback", "commit"),
    [
        (State.WAITING, False, False, False, False),
        (State.TUNING, True, False, True, False),
        (State.TUNED, True, True, True, False),
        (State.ORIGINAL, False, False, False, False),
        (State.ROLLED_BACK, False, True, False, True),
        (State.FAILED, False, True, True, True),  # the plan would be tried again by itself
        (State.STALE, False, True, True, False),
        (State.PASSED_THROUGH, False, False, False, False),
    ],
)
def test_what_may_be_switched_in_each_state(
    state: State, serves: bool, has_plan: bool, rollback: bool, commit: bool
) -> None:
    plan = plans.Plan(Fingerprint("", "", {}, "", "", "strict"), (LeanLoop(),) if has_plan else ())
    status = Status(state, "", (LOOP,) if serves else ())
    assert may(status, plan) == {"rollback": rollback, "commit": commit}


@pytest.mark.parametrize("to", ["rollback", "commit"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxied.example"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_another_sites_page_switches_nothing(server: Running, to: str, headers: dict[str, str], status: int) -> None:
    before = server.model.autotune.status.state
    answer = switch(server, to, **headers)
    assert answer.status_code == status
    if status != 200:
        assert server.model.autotune.status.state == before
        assert answer.json()["error"]["message"]


def test_a_browser_gets_no_leave_to_ask_from_another_site(server: Running) -> None:
    preflight = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{server.url}/autotune/rollback", headers=preflight)
    assert answer.status_code == 405
    assert [name for name in answer.headers if name.startswith("access-control")] == []


# keys


@pytest.mark.parametrize("route", DATA)
def test_data_needs_the_key(locked: Running, route: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx.get(locked.url + route, headers=headers).status_code == 401
    with httpx.stream("GET", locked.url + route, headers=KEY, timeout=60) as answer:
        assert answer.status_code == 200


@pytest.mark.parametrize("to", ["rollback", "commit"])
def test_switching_needs_the_key(locked: Running, to: str) -> None:
    assert switch(locked, to).status_code == 401
    assert switch(locked, to, Authorization="Bearer wrong").status_code == 401
    assert locked.model.autotune.status.state == "tuned"
    assert switch(locked, to, Authorization="Bearer key-2").status_code == 200


@pytest.mark.parametrize("file", FILES)
def test_the_page_itself_needs_no_key_and_holds_no_data(locked: Running, server: Running, file: str) -> None:
    answer = httpx.get(locked.url + file)
    assert answer.status_code == 200
    assert answer.content == httpx.get(server.url + file).content
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert set(re.findall(r"'[^']+'|\S+:", policy)) == {"'none'", "'self'"}
    assert not re.search(r"\btiny\b|lean_loop|key-1", answer.text)
    assert [url for url in re.findall(r"https?://[\w./]+", answer.text) if "w3.org" not in url] == []
    assert httpx.head(locked.url + file).status_code == 200


def test_the_schema_has_the_routes_and_not_the_page(server: Running) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {*DATA, "/autotune/rollback", "/autotune/commit"} <= set(paths)
    assert not set(FILES) & set(paths)
    for path in DATA:
        assert paths[path]["get"]["description"]


# in a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def seen(tab: chromium.Page, script: str) -> Any:
    """Wait until an expression in the page is true, and return its value."""
    found: list[Any] = []

    def true() -> bool:
        found[:] = [tab.look(script)]
        return bool(found[0])

    until(true)
    return found[0]


def text(tab: chromium.Page, of: str) -> str:
    found: str = tab.evaluate(f"document.querySelector({of!r}).textContent")
    return found


def open_up(tab: chromium.Page, server: Running, width: int = 1280, *, dark: bool = False, key: str = "") -> None:
    tab.open(f"{server.url}/", width, dark=dark)
    if key:
        seen(tab, "!document.getElementById('door').hidden")
        tab.evaluate(f"document.getElementById('key').value = {key!r}; document.getElementById('door').requestSubmit()")
    seen(tab, "document.querySelectorAll('#chapters svg').length")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_well(tab: chromium.Page, server: Running, width: int, dark: bool) -> None:
    ask(server)
    open_up(tab, server, width, dark=dark)
    found = tab.evaluate(LOOK)
    assert tab.said == []
    asked = {url.removeprefix(server.url) for url in tab.asked}
    assert asked | {"/icon.svg"} == {*FILES, *DATA} - {"/autotune/report"}  # the icon is asked for once
    assert found["wide"] <= found["room"] == width
    assert (found["page"] < 0.1) is dark
    assert found["texts"] > 50
    assert (found["poor"], found["outside"], found["small"]) == ([], [], [])
    assert found["charts"] == 4 + 2  # live ones, and the report's for this width
    assert tab.evaluate("getComputedStyle(document.querySelector('#chapters svg path')).fill") != "rgb(0, 0, 0)"


@needs_chromium
def test_the_page_shows_the_plan_and_figures_as_they_change(tab: chromium.Page, server: Running) -> None:
    open_up(tab, server)
    assert text(tab, "h1") == "tiny"
    assert text(tab, "#state") == "tuned"
    assert text(tab, "#transforms li") == f"{LOOP}Accepted: 2.50x faster."
    assert "538 MB a token" in text(tab, "#limits")
    assert "mean KLD 1.21" in text(tab, "#trials")
    complete = "+document.querySelector('#counts dd').textContent.replace(',', '')"
    before = tab.evaluate(complete)
    ask(server)
    seen(tab, f"{complete} === {before + 1}")
    seen(tab, "[...document.querySelectorAll('.plot path')].every(path => path.getAttribute('d').includes('L'))")
    assert re.fullmatch(r"[\d.,]+", text(tab, ".live:nth-child(4) b"))
    assert tab.said == []


@needs_chromium
def test_the_page_counts_as_invalid_what_was_wrong_and_nothing_else(tab: chromium.Page, server: Running) -> None:
    rows = "[...document.querySelectorAll('#counts div')]"
    invalid = f"+({rows}.find(row => row.textContent.startsWith('invalid'))?.lastChild.textContent ?? 0)"
    open_up(tab, server)
    seen(tab, f"{rows}.length")
    before = tab.evaluate(invalid)
    metrics = server.served.metrics
    metrics.rejections.inc(3)  # of three answers to one request
    for reason in ("deadline", "abort"):
        metrics.unfinished(reason)
    for status in (400, 408, 429, 499):
        metrics.answered("/v1/completions", status)
    seen(tab, f"{invalid} === {before + 1}")


@needs_chromium
def test_the_buttons_switch_the_plan(tab: chromium.Page, server: Running) -> None:
    open_up(tab, server)
    assert tab.evaluate("document.getElementById('commit').hidden")
    tab.evaluate("document.getElementById('rollback').click()")
    seen(tab, "document.getElementById('state').textContent === 'rolled back'")
    assert server.model.autotune.status.state == "rolled back"
    assert "The original serves" in text(tab, "#said")
    assert tab.evaluate("document.activeElement.id") == "commit"  # the keyboard is where it was
    tab.evaluate("document.getElementById('commit').click()")
    seen(tab, "document.getElementById('state').textContent === 'tuned'")
    assert server.model.autotune.status.transforms == (LOOP,)
    assert tab.said == []


@needs_chromium
def test_a_browser_is_asked_for_the_key(tab: chromium.Page, locked: Running) -> None:
    tab.open(f"{locked.url}/", 360)
    seen(tab, "!document.getElementById('door').hidden")
    assert tab.evaluate("document.getElementById('content').hidden")
    assert tab.evaluate("document.activeElement.id") == "key"
    tab.evaluate("document.getElementById('key').value = 'no'; document.getElementById('door').requestSubmit()")
    seen(tab, "document.getElementById('denied').textContent.includes('does not know this key')")
    open_up(tab, locked, key="key-1")
    assert tab.evaluate("document.cookie + localStorage.length") == "0"
    tab.evaluate("document.getElementById('rollback').click()")
    seen(tab, "document.getElementById('state').textContent === 'rolled back'")
    tab.evaluate("document.getElementById('forget').click()")
    seen(tab, "document.readyState === 'complete' && !document.getElementById('door').hidden")
    assert tab.evaluate("sessionStorage.length") == 0
    assert [url for url in tab.asked if "key" in url] == []


@needs_chromium
def test_names_and_reasons_do_not_become_markup(tab: chromium.Page) -> None:
    with tuned(won(HOSTILE), name=HOSTILE) as server:
        server.served.progress.update(HOSTILE)
        open_up(tab, server, 360)
        seen(tab, f"document.getElementById('lines').textContent.includes({HOSTILE!r})")
        assert text(tab, "h1") == HOSTILE
        assert HOSTILE in text(tab, "#transforms li")
        assert HOSTILE in text(tab, "#trials")
        assert tab.evaluate("document.images.length") == 0
        assert tab.evaluate("[...document.scripts].map(each => each.src)") == [f"{server.url}/page.js"]
        assert tab.evaluate(LOOK)["wide"] <= 360
        assert tab.said == []


@needs_chromium
@pytest.mark.parametrize("part", ["view", "chapters"])
def test_what_could_not_be_read_is_read_later(part: str, tab: chromium.Page, monkeypatch: pytest.MonkeyPatch) -> None:
    made, tries = getattr(page, part), itertools.count()
    may_fail, may_go = threading.Event(), threading.Event()

    def fails_once(*args: Any) -> Any:
        if next(tries):
            assert may_go.wait(WAIT_S)
            return made(*args)
        assert may_fail.wait(WAIT_S)
        raise RuntimeError("no memory")

    monkeypatch.setattr(page, part, fails_once)
    with tuned() as server:
        if part == "view":
            may_fail.set()
        tab.open(f"{server.url}/", 1280)
        if part == "chapters":
            seen(tab, "document.getElementById('drawing').textContent.startsWith('Drawing')")
            may_fail.set()
        seen(tab, "document.getElementById('said').textContent === 'The server failed: RuntimeError.'")
        may_go.set()
        seen(tab, "document.querySelectorAll('#chapters svg').length")
        seen(tab, "document.getElementById('said').textContent === ''")
        assert (text(tab, "h1"), text(tab, "#drawing")) == ("tiny", "")


@needs_chromium
def test_a_page_that_is_closed_is_forgotten(tab: chromium.Page, server: Running) -> None:
    open_up(tab, server)
    assert server.served.feed.watchers >= 1
    tab.call("Page.navigate", url="about:blank")
    until(lambda: server.served.feed.watchers == 0)


def test_it_is_in_the_package() -> None:
    """Data files are installed only if they are listed."""
    import tomllib

    root = Path(__file__).parents[2]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = listed["autotune.serve.page"]
    files = {file.name for file in (root / "autotune/serve/page").iterdir() if file.is_file() and file.suffix != ".py"}
    assert {name for name in files if any(Path(name).match(pattern) for pattern in patterns)} == files != set()
