"""The interface in OpenAPI: it says what the server does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from autotune.serve.app import create_app
from autotune.serve.gate import WORK, HttpLimits
from autotune.serve.openapi import ChatAnswer, CompletionAnswer, ErrorAnswer, ModelList, TextAnswer, TokensAnswer
from tests.models import tiny
from tests.serve.servers import Running, running
from tests.serve.test_tools import CHAT

KEY = {"X-API-Key": "k"}
MOST = 1000  # bytes of a body


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(keys=["k"], limits=HttpLimits(body_bytes=MOST)) as found:
        yield found


@pytest.fixture(scope="module")
def schema(server: Running) -> Any:
    return httpx.get(f"{server.url}/openapi.json", headers=KEY).json()


def operations(schema: Any) -> list[tuple[str, str, Any]]:
    return [(path, method, each) for path, found in schema["paths"].items() for method, each in found.items()]


def check_described(answer: httpx.Response, operation: Any) -> None:
    """An answer has a status, a media type and headers that its operation is described with."""
    described = operation["responses"][str(answer.status_code)]
    assert answer.headers["content-type"].split(";")[0] in described["content"]
    for name, header in described["headers"].items():
        TypeAdapter({"string": str, "integer": int}[header["schema"]["type"]]).validate_python(answer.headers[name])


def test_every_response_has_a_form_and_a_status_of_its_own(schema: Any) -> None:
    for path, method, operation in operations(schema):
        assert not {"422", "default"} & set(operation["responses"]), path
        for status, response in operation["responses"].items():
            forms = [each["schema"] for each in response["content"].values()]
            assert all(forms), (path, method, status)
            assert status.startswith("2") or set(response["content"]) == {"application/json"}, (path, method, status)
    assert len(operations(schema)) > 15


def test_the_schema_is_made_before_anybody_asks_for_it(server: Running) -> None:
    app: Any = create_app(server.served)._app
    assert app.openapi_schema["paths"]


def test_every_reference_leads_somewhere(schema: Any) -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (each for key, each in value.items() if key == "$ref")
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from references(each)

    found = set(references(schema))
    names = {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}
    assert found == names  # and none is left over


def test_routes_that_ask_for_a_key_say_so(server: Running, schema: Any) -> None:
    assert set(schema["components"]["securitySchemes"]) == {"bearer", "header"}
    assert schema["security"] == [{"bearer": []}, {"header": []}]
    for path, _, operation in operations(schema):
        is_open = operation.get("security") == []
        assert is_open == ("401" not in operation["responses"]) == (path == "/livez")
    with running() as without:
        plain = httpx.get(f"{without.url}/openapi.json").json()
    assert "security" not in plain
    assert all("401" not in operation["responses"] for _, _, operation in operations(plain))


def test_what_every_route_may_answer_is_described(
    server: Running, schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusals of the gate, and an answer where an empty request gets one."""
    ending = threading.Event()
    monkeypatch.setattr(server.server._gate, "ending", ending)
    for path, method, operation in operations(schema):
        found = set()
        for headers, sent, ends in (({}, b"", False), (KEY, b"x" * (MOST + 1), False), (KEY, b"", True)):
            if path == "/autotune/events" and ends:
                continue  # a stream without an end
            ending.set() if ends else ending.clear()
            answer = httpx.request(method, server.url + path, headers=headers, content=sent, timeout=60)
            check_described(answer, operation)
            found.add(answer.status_code)
        is_work = path.startswith(WORK)
        assert (401 in found, 503 in found) == (path != "/livez", is_work), path
        assert 413 in found, path


def test_a_full_queue_and_too_many_pages_are_described(server: Running, schema: Any) -> None:
    for path, method in (("/v1/completions", "post"), ("/v1/chat/completions", "post"), ("/autotune/events", "get")):
        described = schema["paths"][path][method]["responses"]["429"]
        assert described["headers"]["Retry-After"]["required"], path


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/autotune/rollout", "GET, POST"),
        ("/livez", "GET, HEAD"),
        ("/v1/completions", "POST"),
        ("/v1/models/x", "GET"),
        ("/page.css", "GET, HEAD"),
    ],
)
def test_a_path_without_a_method_names_those_that_it_has(path: str, methods: str, server: Running) -> None:
    for method in ("OPTIONS", "DELETE"):
        answer = httpx.request(method, server.url + path, headers=KEY)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("POST", "/chat/completions", 404, "nothing at /chat/completions; did you mean /v1/chat/completions? "),
        ("POST", "/v1/v1/completions", 404, "nothing at /v1/v1/completions; did you mean /v1/completions? "),
        ("GET", "/models", 404, "nothing at /models; did you mean /v1/models? "),
        ("GET", "/xyz", 404, "nothing at /xyz; /openapi.json lists what is there"),
        ("GET", "/v1/completions", 405, "/v1/completions takes POST, not GET"),
        ("POST", "/livez", 405, "/livez takes GET, HEAD, not POST"),
    ],
)
def test_a_path_or_a_method_that_is_not_there_is_told_which_is(
    method: str, path: str, status: int, says: str, server: Running
) -> None:
    answer = httpx.request(method, server.url + path, headers=KEY, timeout=60)
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(says)


def test_a_body_that_must_be_declared_as_json_is_described_so(server: Running, schema: Any) -> None:
    for path, method, operation in operations(schema):
        assert ("requestBody" in operation) == (method == "post"), path
        if method == "post":
            assert set(operation["requestBody"]["content"]) == {"application/json"}
            assert operation["requestBody"]["required"]
            undeclared = httpx.post(server.url + path, headers=KEY, content=b"{}")
            assert undeclared.status_code in {400, 415}
            check_described(undeclared, operation)


@pytest.mark.parametrize(
    ("method", "path", "body", "form", "statuses"),
    [
        ("get", "/v1/models", None, ModelList, {"503"}),
        ("post", "/v1/completions", {"prompt": "x", "max_tokens": 3, "logprobs": 2}, CompletionAnswer, {"429", "503"}),
        (
            "post",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 1},
            ChatAnswer,
            {"429", "503"},
        ),
        ("post", "/tokenize", {"prompt": "x"}, TokensAnswer, set()),
        ("post", "/detokenize", {"tokens": [70]}, TextAnswer, set()),
    ],
)
def test_answers_and_errors_are_as_described(
    method: str, path: str, body: Any, form: Any, statuses: set[str], server: Running, schema: Any
) -> None:
    answer = httpx.request(method, server.url + path, json=body, headers=KEY, timeout=60)
    assert answer.status_code == 200
    form.model_validate(answer.json())
    declared = schema["paths"][path][method]["responses"]
    reference = declared["200"]["content"]["application/json"]["schema"]["$ref"]
    assert reference.endswith(f"/{form.__name__}")
    assert statuses | {"401"} <= set(declared)
    if body is None:
        return
    assert {"400", "404", "408", "413"} <= set(declared)
    for status, sent in ((400, {"foo": 1}), (404, body | {"model": "other"})):
        refused = httpx.request(method, server.url + path, json=sent, headers=KEY)
        assert refused.status_code == status
        check_described(refused, schema["paths"][path][method])
        ErrorAnswer.model_validate(refused.json())


def test_a_call_is_as_described() -> None:
    with running(tiny("llama", max_position_embeddings=2048)) as server:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json=CHAT | {"tool_choice": "required", "temperature": 0, "parallel_tool_calls": False},
            timeout=60,
        ).json()
    assert ChatAnswer.model_validate(answer).choices[0].message.tool_calls


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_loads_anything_from_elsewhere(path: str, server: Running) -> None:
    assert httpx.get(server.url + path, headers=KEY).status_code == 404
