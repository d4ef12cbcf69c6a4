"""Large requests and large answers: the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import httpx
import pytest
from fastapi.responses import JSONResponse

from autotune.serve import bodies
from autotune.serve.schema import CompletionBody, DetokenizeBody
from tests.models import CONTEXT
from tests.serve.servers import Running, running

USER = {"role": "user", "content": "x"}
HALF = "a\ud83d"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@contextmanager
def held_up(owner: Any, name: str, ask: Callable[[], Any]) -> Iterator[list[Any]]:
    """In the block, a function that `ask` leads to waits; then the list that it gets has what `ask` returned."""
    begun, go_on, function, found = threading.Event(), threading.Event(), getattr(owner, name), list[Any]()

    def held(*given: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return function(*given)

    with mock.patch.object(owner, name, held):
        asking = threading.Thread(target=lambda: found.append(ask()))
        asking.start()
        try:
            assert begun.wait(60)
            yield found
        finally:
            go_on.set()
            asking.join()


@pytest.mark.parametrize(
    ("route", "body", "headers"),
    [
        ("/tokenize", {"prompt": "xyz"}, JSON),
        ("/tokenize", {"messages": [USER] * 3}, {"Content-Type": "application/vnd.x+json; charset=utf-8"}),
        ("/tokenize", {"messages": [USER, {"role": "user"}]}, JSON),
        ("/tokenize", {"prompt": "x", "unknown": 1}, JSON),
        ("/tokenize", {"prompt": HALF}, JSON),
        ("/tokenize", {}, JSON),
        ("/tokenize", [1, 2], JSON),
        ("/tokenize", {"prompt": "x"}, {}),
        ("/tokenize", {"prompt": "x"}, {"Content-Type": "text/plain"}),
        ("/tokenize", b'{"prompt": "x"', JSON),
        ("/tokenize", b'{"prompt": "\xff"}', JSON),
        ("/tokenize", b"[" * 100_000, JSON),
        ("/detokenize", {"tokens": [3, 4, 5]}, JSON),
        ("/detokenize", {"tokens": [3, -4, "5"]}, JSON),
        ("/v1/completions", {"prompt": [[3, 4], [5, True]]}, JSON),
        ("/v1/completions", {"prompt": [3, 4], "max_tokens": 1, "stream_options": {}}, JSON),
        ("/v1/chat/completions", {"messages": [USER], "temperature": 3}, JSON),
    ],
)
def test_a_body_that_a_thread_reads_is_answered_as_any_other(
    route: str, body: Any, headers: dict[str, str], server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, read = [], list[bytes]()
    read_body = bodies.read_body
    monkeypatch.setattr(bodies, "read_body", lambda body, kind: read.append(body) or read_body(body, kind))
    for most in (10**9, 0):
        monkeypatch.setattr(bodies, "INLINE", most)
        answer = httpx.post(server.url + route, content=content, headers=headers, timeout=60)
        found.append((answer.status_code, answer.json()))
    assert found[0] == found[1]
    assert read == ([content] if "json" in headers.get("Content-Type", "") else [])


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("_integer", {"tokens": [3] * bodies.INLINE}),
        ("_same", {"messages": [USER] * 1000}),
    ],
)
def test_the_server_answers_while_a_large_body_is_read(name: str, body: dict[str, Any], server: Running) -> None:
    """Which is in the midst of it, where the scanner calls Python."""

    def ask() -> int:
        route = "/detokenize" if "tokens" in body else "/tokenize"
        return httpx.post(server.url + route, json=body, timeout=60).status_code

    with held_up(bodies, name, ask) as answers:
        assert httpx.get(f"{server.url}/livez", timeout=60).text == "ok"
        assert httpx.post(f"{server.url}/tokenize", json={"prompt": "x"}, timeout=60).status_code == 200
        assert not answers
    assert answers == [400]  # both are longer than the context


FORM = {"type": "regex", "regex": "a"}


@pytest.mark.parametrize(
    ("part", "name", "route", "body"),
    [
        ("prompts", "encode", "/tokenize", {"prompt": "x"}),
        ("prompts", "of_completion", "/v1/completions", {"prompt": "x"}),
        ("prompts", "of_chat", "/v1/chat/completions", {"messages": [USER]}),
        ("grammars", "of", "/v1/completions", {"prompt": "x", "response_format": FORM}),
        ("grammars", "of", "/v1/chat/completions", {"messages": [USER], "response_format": FORM}),
    ],
)
def test_the_server_answers_while_a_prompt_is_tokenised_or_a_form_compiled(
    part: str, name: str, route: str, body: dict[str, Any], server: Running
) -> None:
    def ask() -> int:
        return httpx.post(server.url + route, json=body, timeout=60).status_code

    with held_up(getattr(server.served, part), name, ask) as answers:
        assert httpx.get(f"{server.url}/livez", timeout=60).text == "ok"
        assert not answers
    assert answers == [200]


class Told(list[Any]):
    """A list that notes each of its items when Python comes to it. C takes them without asking, or all at once."""

    def __init__(self, items: list[Any], noted: list[Any]) -> None:
        super().__init__(items)
        self.noted = noted

    def __iter__(self) -> Iterator[Any]:
        for each in super().__iter__():
            self.noted.append(each)
            yield each


@pytest.mark.parametrize(
    ("kind", "form"),
    [(DetokenizeBody, lambda ids: {"tokens": ids}), (CompletionBody, lambda ids: {"prompt": [ids]})],
)
def test_token_ids_are_looked_at_in_python_which_gives_others_their_turns(kind: Any, form: Any) -> None:
    noted = list[Any]()
    kind.model_validate(form(Told([5, 6], noted)))
    assert noted == [5, 6]


def test_an_answer_is_written_in_python_which_gives_others_their_turns() -> None:
    noted = list[Any]()
    inner = [Told([1], noted), Told([2], noted)]
    assert bodies.write_body({"list": Told(inner, noted)}) == b'{"list":[[1],[2]]}'
    assert noted == [[1], 1, [2], 2]


@pytest.mark.parametrize(
    "found", [{"a": 'é\u2028"', "b": [1, -2.5, None, True]}, {}, {"a": {"b": []}}, {"a": 1e-9}], ids=str
)
def test_what_is_written_in_a_thread_is_what_is_written_elsewhere(found: dict[str, Any]) -> None:
    assert bodies.write_body(found) == JSONResponse(found).body


@pytest.mark.parametrize(("parts", "in_loop"), [(bodies.FEW, True), (bodies.FEW + 1, False)])
def test_an_answer_of_many_parts_is_made_in_a_thread(parts: int, in_loop: bool) -> None:
    threads = list[int]()
    answer = asyncio.run(bodies.respond(lambda: {"threads": threads.append(threading.get_ident())}, parts))
    assert (threads == [threading.get_ident()]) == in_loop
    assert (answer.body, answer.headers["content-type"]) == (b'{"threads":null}', "application/json")


MANY = {"logprobs": 2, "max_tokens": 9, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/tokenize", {"prompt": "x" * 9}),
        ("/detokenize", {"tokens": [5] * 9}),
        ("/v1/completions", {"prompt": "x", **MANY}),
        ("/v1/chat/completions", {"messages": [USER], **MANY, "logprobs": True, "top_logprobs": 2}),
    ],
)
def test_the_server_answers_while_a_large_answer_is_written(
    route: str, body: dict[str, Any], server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> Any:
        answer = httpx.post(server.url + route, json=body, timeout=60).json()
        return {name: value for name, value in answer.items() if name not in ("id", "created")}

    small = ask()
    monkeypatch.setattr(bodies, "FEW", 8)
    with held_up(bodies, "write_body", ask) as found:
        assert httpx.get(f"{server.url}/livez", timeout=60).text == "ok"
        assert not found
    assert found == [small]


def test_tokens_that_are_more_than_the_context_are_not_written(server: Running) -> None:
    for count, status in ((CONTEXT, 200), (CONTEXT + 1, 400)):
        answer = httpx.post(f"{server.url}/detokenize", json={"tokens": [5] * count}, timeout=60)
        assert answer.status_code == status
    error = answer.json()["error"]
    assert f"tokens has {CONTEXT + 1} tokens; the most are {CONTEXT}, the model's context" in error["message"]
    assert (error["param"], error["code"]) == ("tokens", "context_length_exceeded")


def test_a_token_s_text_is_made_once(server: Running) -> None:
    text_of: Any = server.served.answers.text_of
    text_of.cache_clear()
    body = {"prompt": "yz", **MANY, "logprobs": 5}
    answers = [httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"] for _ in range(2)]
    assert answers[0] == answers[1]
    made = text_of.cache_info()
    assert made.hits > made.misses == made.currsize > 0
