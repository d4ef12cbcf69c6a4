"""What people who run the server rely on: keys, limits, cancellation, readiness, figures, and an orderly end."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from autotune.cli import main
from autotune.errors import QueueFullError, UnsupportedModelError
from autotune.live.status import State
from autotune.report import Report
from autotune.runtime.variant import Variant
from autotune.serve import connection, run
from autotune.serve.gate import HttpLimits
from autotune.serve.run import become_ready, listen
from autotune.serve.service import Service
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.plan import Plan
from autotune.tune.tuned import Tuned
from tests.models import tiny, tiny_tokenizer, token_prompts
from tests.serve.engines import WAIT_S, counted
from tests.serve.servers import Running, running, until

PROMPT = token_prompts(1, length=12)[0]
LONG = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
KEY = {"Authorization": "Bearer key-1"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(keys=["key-1", "key-2"], limits=HttpLimits(body_bytes=10_000), longest=100) as found:
        yield found


@pytest.fixture
def slow(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Every token takes a while, so that an answer lasts until it is cancelled."""
    model = server.model
    forward = model.lm_head.forward

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.lm_head, "forward", late)
    yield server
    until(lambda: server.served.answers.running == 0)


@pytest.mark.parametrize("route", ["/readyz", "/health", "/metrics", "/v1/models", "/openapi.json", "/nowhere"])
def test_every_route_but_one_asks_for_the_key(server: Running, route: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic key-1"}, {"X-API-Key": "key-"}):
        answer = httpx.get(server.url + route, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for headers in (KEY, {"X-API-Key": "key-2"}):
        assert httpx.get(server.url + route, headers=headers).status_code == (404 if route == "/nowhere" else 200)
    assert httpx.get(f"{server.url}/livez").text == "ok"


def test_a_request_keeps_the_id_that_it_came_with(server: Running) -> None:
    assert httpx.get(f"{server.url}/livez", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    for odd in ("a b", "x" * 200, ""):
        given = httpx.get(f"{server.url}/livez", headers={"X-Request-ID": odd}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", given)


def test_a_body_has_a_size_and_a_time(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    large = httpx.post(f"{server.url}/v1/completions", content=b"x" * 10_001, headers=KEY)
    assert large.status_code == 413
    assert "10001 bytes; the most are 10000" in large.json()["error"]["message"]
    unsaid = httpx.post(f"{server.url}/v1/completions", content=iter([b"x" * 6000] * 2), headers=KEY)
    assert unsaid.status_code == 413
    prompt = httpx.post(f"{server.url}/v1/completions", json={"prompt": [5] * 101}, headers=KEY)
    assert "101 tokens; the most are 100" in prompt.json()["error"]["message"]
    monkeypatch.setattr(server.server._gate, "limits", HttpLimits(body_s=0.1))
    with socket.create_connection(address(server)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-API-Key: key-1\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in half.recv(1000).split(b"\r\n")[0]


@pytest.mark.parametrize(("size", "key", "ends", "status"), [(9, 0, 0, 401), (9, 1, 1, 503), (10_001, 1, 0, 413)])
def test_who_sends_a_body_after_the_refusal_still_gets_it(
    server: Running, size: int, key: int, ends: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = threading.Event()
    monkeypatch.setattr(server.server._gate, "ending", ending)
    if ends:
        ending.set()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-API-Key: {'key-1' * key}\r\nContent-Length: {size}\r\n\r\n"
    with socket.create_connection(address(server)) as client:
        client.sendall(head.encode())
        got = b""
        while not got.endswith(b"}}"):
            got += client.recv(1000)
        assert f" {status} ".encode() in got.split(b"\r\n")[0]
        assert server.server._gate.under_way == 0  # a server that ends does not wait for it
        for _ in range(size):
            client.sendall(b"x")
        assert client.recv(1000) == b""  # closed, not reset


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_connection_that_says_nothing_more_is_closed(
    server: Running, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_whole := sent.endswith(b"\r\n\r\n"):
        monkeypatch.setattr(server.server.config, "timeout_keep_alive", 0.3)
    else:
        monkeypatch.setattr(connection, "HEADERS_S", 0.3)
    with socket.create_connection(address(server)) as silent:
        silent.sendall(sent)
        silent.settimeout(WAIT_S)
        got = b""
        while part := silent.recv(1000):
            got += part
    assert got.endswith(b"ok") == is_whole


def test_a_connection_may_rest_between_requests_but_not_within_headers(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.server.config.timeout_keep_alive == 75
    with socket.create_connection(address(server)) as own:
        own.settimeout(WAIT_S)
        for _ in range(2):
            own.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            got = b""
            while not got.endswith(b"ok"):
                got += (part := own.recv(1000))
                assert part, "it was closed"
            (held,) = (each for each in server.server.server_state.connections if each.client == own.getsockname())
            until(lambda held=held: held.timeout_keep_alive_task is not None)
            assert held._deadline is None
        monkeypatch.setattr(connection, "HEADERS_S", 0.3)
        own.sendall(b"GET /li")
        assert own.recv(1000) == b""


def test_an_answer_that_takes_long_is_not_cut(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.3)
    body = LONG | {"max_tokens": 12}
    answer = httpx.post(f"{slow.url}/v1/completions", json=body, headers=KEY)
    assert answer.json()["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_goes(slow: Running, stream: bool) -> None:
    aborted = figure(slow, 'autotune:request_unfinished_total{model_name="tiny",reason="abort"}')
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-API-Key: key-1\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(address(slow)) as client:
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        until(lambda: slow.served.answers.running == 1)
        if stream:
            assert client.recv(10)
    until(lambda: slow.served.answers.running == 0)
    now = figure(slow, 'autotune:request_unfinished_total{model_name="tiny",reason="abort"}')
    assert now == aborted + 1


def test_a_full_queue_says_when_to_come_again(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    before = figure(server, 'autotune:admission_rejections_total{model_name="tiny"}')

    def full(*_: Any, **__: Any) -> None:
        raise QueueFullError("256 submitted requests wait, and no more may")

    handle = SimpleNamespace(submit=full, waiting=256)
    monkeypatch.setattr(server.served.answers, "model", SimpleNamespace(autotune=handle))
    monkeypatch.setattr(server.served.metrics.whole, "per_s", lambda: 10.0)
    for stream in (True, False):
        answer = httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": stream}, headers=KEY)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "26"
        assert answer.json()["error"]["code"] == "queue_full"
    assert figure(server, 'autotune:admission_rejections_total{model_name="tiny"}') == before + 2


def test_a_request_of_many_answers_lets_others_begin(server: Running) -> None:
    """The model decodes one sequence at a time here."""
    many = LONG | {"max_tokens": 10, "n": 16}
    ended = list[str]()

    def ask(name: str, body: dict[str, Any]) -> None:
        httpx.post(f"{server.url}/v1/completions", json=body, headers=KEY, timeout=60).raise_for_status()
        ended.append(name)

    large = threading.Thread(target=ask, args=("large", many))
    small = threading.Thread(target=ask, args=("small", LONG | {"max_tokens": 2}))
    with counted(server) as turns:
        for asking, answers in ((large, 16), (small, 17)):
            asking.start()
            until(lambda: server.served.answers.running == answers)  # noqa: B023
        turns.open()
        large.join()
        small.join()
    assert ended == ["small", "large"]


def test_a_deadline_gives_an_answer_up(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = slow.served.answers
    with monkeypatch.context() as short:
        short.setattr(answers, "deadline_s", 0.25)
        answer = httpx.post(f"{slow.url}/v1/completions", json=LONG, headers=KEY)
    assert answer.status_code == 408
    assert "the deadline of 0.25 s passed" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
    with httpx.stream("POST", f"{slow.url}/v1/completions", json=LONG | {"stream": True}, headers=KEY) as late:
        assert late.status_code == 200  # it has begun
        (asked,) = answers._asked
        asked.terms.deadline_s = 1e-9
        events = [line for line in late.iter_lines() if line]
    assert "deadline" in json.loads(events[-2][6:])["error"]["message"]
    assert events[-1] == "data: [DONE]"


def test_a_model_that_fails_is_a_500_and_the_server_goes_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("secret path /x")

        broken.setattr(server.model.lm_head, "forward", fail)
        answer = httpx.post(f"{server.url}/v1/completions", json=LONG, headers=KEY)
        assert answer.status_code == 500
        assert "secret" not in answer.text
    assert httpx.post(f"{server.url}/v1/completions", json=LONG, headers=KEY).status_code == 200


@pytest.mark.parametrize(
    ("state", "plan", "untuned", "answered", "said"),
    [
        (State.TUNED, True, False, True, None),
        (State.ORIGINAL, True, False, True, None),
        (State.FAILED, False, False, True, None),
        (State.TUNING, False, False, True, "the model is tuning"),
        (State.TUNING, True, False, True, None),  # again, after a search that ended
        (State.WAITING, False, False, True, "the model is waiting"),
        (State.WAITING, False, True, True, None),
        (State.TUNED, True, False, False, "no request was answered yet"),
        (State.TUNING, True, False, False, "no request was answered yet"),
    ],
)
def test_ready_is_tuned_or_declared_untuned_and_tried_once(
    state: State, plan: bool, untuned: bool, answered: bool, said: str | None
) -> None:
    status = SimpleNamespace(state=state, detail="")
    model: Any = SimpleNamespace(autotune=SimpleNamespace(status=status, plan=object() if plan else None))
    unused: Any = None
    answers: Any = SimpleNamespace(finished=int(answered))
    served = Service(model, "tiny", unused, answers, unused, unused, untuned=untuned)
    assert served.unready() == said


def test_a_search_that_is_repeated_leaves_the_server_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[tuple[State, str | None]]()

    def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        seen.append((own.model.autotune.status.state, own.served.unready()))
        plan = Plan(Fingerprint("", "", {}, "", "", "strict"), ())
        return Tuned(Variant(model, traffic, workload), plan, Report({}), "kept the original")

    with running() as own:
        own.served.untuned = False
        monkeypatch.setattr(tuning, "tune", tune)
        for _ in range(2):
            own.model.autotune.tune(token_prompts(2))
            assert own.model.autotune.status.state is State.ORIGINAL
            assert own.served.unready() is None
    assert seen == [(State.TUNING, "the model is tuning: started"), (State.TUNING, None)]


@pytest.mark.parametrize("rescue", ["its own request", "a client's"])
def test_a_first_request_that_fails_is_told_and_tried_again(
    rescue: str, server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served, body = server.served, LONG | {"max_tokens": 1}
    monkeypatch.setattr(served.answers, "finished", 0)
    monkeypatch.setattr(served, "failure", None)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    def waits() -> Iterator[float]:
        for tries in (1, 2, 3):
            assert served.unready() == "no request was answered yet; the server's own failed: RuntimeError: no memory"
            if tries == 3:
                broken.undo()
            if tries == 3 and rescue == "a client's":
                assert httpx.post(f"{server.url}/v1/completions", json=body, headers=KEY).status_code == 200
                broken.setattr(served.answers, "model", None)  # a further try would fail
            yield 0.0
        yield pytest.fail("it went on")

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(served.answers, "model", SimpleNamespace(autotune=SimpleNamespace(submit=fail)))
        asyncio.run(become_ready(served, waits()))
    assert served.unready() is None
    assert served.answers.finished == 1
    assert "the server's own request failed" in caplog.text
    assert "no memory" in caplog.text


def test_a_server_that_is_not_ready_says_why(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert httpx.get(f"{server.url}/readyz", headers=KEY).json()["state"] == "waiting"
    monkeypatch.setattr(server.served, "untuned", False)
    answer = httpx.get(f"{server.url}/readyz", headers=KEY)
    assert answer.status_code == 503
    assert "the model is waiting" in answer.json()["reason"]


def test_the_figures_add_up(server: Running) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")
    lines = [f'autotune:{name}{{model_name="tiny"}}' for name in names]
    before = [figure(server, line) for line in lines]
    body = {"prompt": PROMPT, "max_tokens": 7, "temperature": 0, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers=KEY).status_code == 200
    assert [figure(server, line) - old for line, old in zip(lines, before, strict=True)] == [12, 7, 1]
    text = httpx.get(f"{server.url}/metrics", headers=KEY).text
    assert 'autotune:plan_info{model_name="tiny",state="waiting",transforms=""} 1.0' in text
    assert "key-" not in text


def test_the_end_waits_for_answers_under_way() -> None:
    with running() as server:
        got: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: got.append(httpx.post(f"{server.url}/v1/completions", json=LONG)))
        with counted(server) as turns:
            asking.start()
            until(lambda: server.served.answers.running == 1)
            server.server.handle_exit(15, None)
            turns.open()
            asking.join()
        assert got[0].json()["usage"]["completion_tokens"] == 200
        until(lambda: refuses(server.url))
        assert not server.server.force_exit
        server.server.handle_exit(15, None)
        assert server.server.force_exit


@pytest.mark.parametrize(
    ("under_way", "is_forced", "passed_s", "has_drained"),
    [(1, False, 29.0, False), (1, False, 30.0, True), (1, True, 1.0, True), (0, False, 1.0, True)],
)
def test_answers_under_way_get_so_much_time(
    under_way: int, is_forced: bool, passed_s: float, has_drained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 100.0 + passed_s])
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(now)))
    gate: Any = SimpleNamespace(ending=threading.Event(), under_way=1, limits=HttpLimits())
    ending = run.Server(gate, drain_s=30)
    assert not ending._has_drained()
    assert gate.ending.is_set()
    gate.under_way, ending.force_exit = under_way, is_forced
    assert ending._has_drained() is has_drained


def test_what_comes_while_it_ends_is_refused(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = threading.Event()
    ending.set()
    monkeypatch.setattr(server.server._gate, "ending", ending)
    monkeypatch.setattr(server.served, "ending", ending)
    for route in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = httpx.post(server.url + route, json=LONG, headers=KEY)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "ending"
    assert httpx.get(f"{server.url}/livez").status_code == 200
    for route in ("/readyz", "/health"):
        answer = httpx.get(server.url + route, headers=KEY)
        assert (answer.status_code, answer.json()["ready"]) == (503, False)
        assert answer.json()["reason"].startswith("draining: ")


@pytest.mark.parametrize("route", ["/livez", "/readyz", "/health"])
def test_a_probe_may_ask_for_the_head_alone(route: str, server: Running) -> None:
    answer = httpx.head(server.url + route, headers=KEY)
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 0


@pytest.mark.parametrize("why", ["the time is up", "a second signal"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_is_cut_says_so(why: str, stream: bool) -> None:
    """Until then, probes are answered, and further requests are refused."""
    body, got = LONG | {"max_tokens": 90_000, "stream": stream}, list[httpx.Response]()
    endless = tiny("llama", max_position_embeddings=100_000)
    with running(endless) as server, httpx.Client(base_url=server.url) as client:
        looks, on_tick = list[int](), server.server.on_tick

        async def look(counter: int) -> bool:
            looks.append(counter)
            return await on_tick(counter)

        server.server.on_tick = look  # type: ignore[method-assign]
        asking = threading.Thread(target=lambda: got.append(client.post("/v1/completions", json=body)))
        asking.start()
        until(lambda: server.served.answers.running == 1)
        until(lambda: not stream or server.served.metrics.first.percentiles())
        server.server.handle_exit(15, None)
        for _ in range(3):  # uvicorn looks whether it is to end
            before = len(looks)
            assert client.get("/readyz").json()["reason"].startswith("draining: ")
            assert client.post("/v1/completions", json=body).status_code == 503
            until(lambda: len(looks) > before + 1)  # noqa: B023
        if why == "a second signal":
            server.server.handle_exit(15, None)
        else:
            server.server._until_s = 1e-9
        asking.join()
        until(lambda: refuses(server.url))
    (answer,) = got
    assert answer.status_code == (200 if stream else 503)
    if stream:
        *_, error, done = [line for line in answer.text.splitlines() if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "ending"
        assert done == "data: [DONE]"
    else:
        assert answer.json()["error"]["code"] == "ending"


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "no/such/model", "--port", str(port)]) == 3
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_many_who_vanish_leave_nothing_behind(slow: Running) -> None:
    async def vanish() -> None:
        async with httpx.AsyncClient(headers=KEY, timeout=0.3) as client:
            asked = (client.post(f"{slow.url}/v1/completions", json=LONG) for _ in range(20))
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(vanish())
    until(lambda: slow.served.answers.running == 0)
    until(lambda: not [t for t in threading.enumerate() if t.name == "autotune-request"])
    assert httpx.get(f"{slow.url}/livez").status_code == 200


def test_a_model_without_a_known_context_is_refused() -> None:
    unknown = SimpleNamespace(vocab_size=256)
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: unknown))
    with pytest.raises(UnsupportedModelError, match="how many tokens its context holds"):
        Service.of(model, tiny_tokenizer(), "x")


def test_a_model_without_a_template_completes_but_does_not_chat() -> None:
    with running(template=None) as server:
        chat = {"messages": [{"role": "user", "content": "x"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=chat)
        assert answer.status_code == 400
        assert "no chat template; use /v1/completions" in answer.json()["error"]["message"]
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def address(server: Running) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/livez")
    except httpx.TransportError:
        return True
    return False


def figure(server: Running, line: str) -> float:
    """A figure of /metrics; 0 if it is not there yet."""
    text = httpx.get(f"{server.url}/metrics", headers=KEY).text
    return next((float(each.split()[-1]) for each in text.splitlines() if each.startswith(line)), 0.0)
