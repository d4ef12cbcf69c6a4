"""Bodies of requests: what is taken, what is refused, and what the refusal says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from autotune.serve.fields import MOST_DEPTH
from autotune.serve.prompts import Prompts
from autotune.serve.refusal import Refusal
from autotune.serve.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from autotune.serve.validation import refusal_of
from tests.models import tiny
from tests.serve.servers import TEMPLATE, Running, running

USER = {"role": "user", "content": "x"}
COMPLETION: dict[str, Any] = {"prompt": "x"}
CHAT: dict[str, Any] = {"messages": [USER]}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DEEP: Any = {}
for _ in range(MOST_DEPTH):
    DEEP = {"a": DEEP}
HALF = "a\ud83d"
KNOWING = "{{ '!' * (shouts or 0) }}" + TEMPLATE


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(template=KNOWING) as found:
        yield found


def refused(kind: type, body: Any) -> Refusal:
    """How a server refuses a body."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)  # type: ignore[attr-defined]
    found = [{**each, "loc": ("body", *each["loc"])} for each in caught.value.errors()]
    return refusal_of(RequestValidationError(found, body=body))


@pytest.mark.parametrize(
    ("kind", "base"),
    [(CompletionBody, COMPLETION), (ChatBody, CHAT), (TokenizeBody, COMPLETION), (TokenizeBody, CHAT)],
)
def test_null_is_as_if_it_were_left_out(kind: Any, base: dict[str, Any]) -> None:
    optional = [name for name, field in kind.model_fields.items() if not field.is_required() and name not in base]
    nulls = dict.fromkeys([*optional, *kind.neutral])
    assert kind.model_validate(base | nulls) == kind.model_validate(base)
    assert len(nulls) > 4


@pytest.mark.parametrize(
    ("kind", "base", "change"),
    [
        (CompletionBody, COMPLETION, {"best_of": 1, "echo": False, "suffix": "", "min_tokens": 0}),
        (CompletionBody, COMPLETION, {"store": False, "metadata": {}, "stop_token_ids": [], "service_tier": "auto"}),
        (ChatBody, CHAT, {"modalities": ["text"], "functions": [], "function_call": "none", "store": False}),
        (ChatBody, {"messages": [USER]}, {"messages": [USER | {"refusal": None, "annotations": [], "audio": None}]}),
        (
            ChatBody,
            CHAT | {"stream": True, "stream_options": {}},
            {"stream_options": {"include_usage": None, "include_obfuscation": False}},
        ),
    ],
    ids=str,
)
def test_a_field_that_asks_for_nothing_is_taken(kind: Any, base: dict[str, Any], change: dict[str, Any]) -> None:
    assert kind.model_validate(base | change) == kind.model_validate(base)


@pytest.mark.parametrize(
    ("kind", "change", "param", "says"),
    [
        # fields that are known but not supported
        (CompletionBody, {"best_of": 2}, "best_of", "does not support it; leave it out, or send 1"),
        (CompletionBody, {"best_of": True}, "best_of", "does not support it"),
        (CompletionBody, {"echo": True}, "echo", "leave it out, or send false"),
        (CompletionBody, {"suffix": "x"}, "suffix", "does not support it"),
        (CompletionBody, {"min_tokens": 3}, "min_tokens", "does not support it"),
        (CompletionBody, {"stop_token_ids": [5]}, "stop_token_ids", "does not support it"),
        (ChatBody, {"metadata": {"a": "b"}}, "metadata", "does not support it"),
        (ChatBody, {"store": True}, "store", "does not support it"),
        (ChatBody, {"reasoning_effort": "low"}, "reasoning_effort", "does not support it"),
        (ChatBody, {"messages": [USER | {"audio": {"id": "a"}}]}, "messages.0.audio", "does not support it"),
        (
            ChatBody,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.image_url",
            "does not support it",
        ),
        # unknown ones
        (CompletionBody, {"foo": None}, "foo", "unknown field foo: this server does not know it; leave it out"),
        (CompletionBody, {"max_token": 1}, "max_token", "does not know it; did you mean max_tokens?"),
        (ChatBody, {"max_output_tokens": 1}, "max_output_tokens", "did you mean max_tokens?"),
        (ChatBody, {"stop_sequences": 1}, "stop_sequences", "leave it out"),
        (CompletionBody, {"max_tokens": -186}, "max_tokens", "greater than or equal to 1, and it is -186"),
        (CompletionBody, {"max_tokens": "abc"}, "max_tokens", "unable to parse string as an integer, and it is 'abc'"),
        (CompletionBody, {"temperature": "x" * 99}, "temperature", f"and it is '{'x' * 39}"),
        (CompletionBody, {"stop": {}}, "stop", "expected a text or a list of texts, and it is {}"),
        (ChatBody, {"messages": []}, "messages", "at least 1 item"),
        (ChatBody, {"messages": "hello"}, "messages", "a valid list, and it is 'hello'"),
        (ChatBody, {"messages": [USER | {"foo": 1}]}, "messages.0.foo", "unknown field messages.0.foo"),
        (ChatBody, {"\ud800": 1}, "\\ud800", "unknown field"),
        # limits, rather than the types that something could have had instead
        (CompletionBody, {"prompt": ["x"] * 65}, "prompt", "there are 65; a request has at most 64"),
        (CompletionBody, {"prompt": [[5]] * 65}, "prompt", "there are 65; a request has at most 64"),
        (CompletionBody, {"prompt": ["x"] * 64, "n": 16}, "n", "are 1024 answers; a request has at most 128"),
        (CompletionBody, {"prompt": ["x"] * 64, "n": 3}, "n", "64 prompts with 3 answers each are 192"),
        (CompletionBody, {"prompt": [-1]}, "prompt", "number 0 is -1; expected a token id"),
        (CompletionBody, {"prompt": [5, True]}, "prompt", "number 1 is True"),
        (CompletionBody, {"prompt": [[False]]}, "prompt", "number 0 is False"),
        (CompletionBody, {"prompt": [[5], [6, "a"]]}, "prompt", "number 1 is 'a'"),
        (CompletionBody, {"prompt": ["x", 5]}, "prompt", "number 1 is 5; expected a text"),
        (CompletionBody, {"prompt": []}, "prompt", "it is empty; expected a text"),
        (CompletionBody, {"prompt": 5}, "prompt", "of another type; expected a text"),
        (CompletionBody, {"prompt": None}, "prompt", "Field required"),
        (CompletionBody, {"stop": ["x"] * 17}, "stop", "at most 16 items"),
        (CompletionBody, {"stop": ["x", ""]}, "stop.1", "at least 1 character"),
        (CompletionBody, {"stop": ""}, "stop", "at least 1 character"),
        (CompletionBody, {"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "has 301 tokens; the most"),
        (ChatBody, {"messages": [USER | {"content": []}]}, "messages.0.content", "at least 1 item"),
        (ChatBody, {"messages": [USER | {"content": 5}]}, "messages.0.content", "expected a text or a list"),
        (ChatBody, {"messages": [USER] * 4097}, "messages", "4097 parts; the most are 4096"),
        (
            ChatBody,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 4097}]},
            "messages",
            "4097 parts; the most are 4096",
        ),
        # no names of types in the path
        (ChatBody, {"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function", "Field required"),
        (
            ChatBody,
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name",
            "Field required",
        ),
        (ChatBody, {"tool_choice": "perhaps"}, "tool_choice", "'none', 'auto' or 'required'"),
        (ChatBody, {"response_format": {"type": "regex"}}, "response_format.regex", "Field required"),
        (
            ChatBody,
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
            "Field required",
        ),
        (ChatBody, {"response_format": {}}, "response_format", "'type'"),
        # fields that need others
        (CompletionBody, {"stream_options": {"include_usage": True}}, "stream_options", "send stream: true"),
        (ChatBody, {"top_logprobs": 2}, "top_logprobs", "send logprobs: true"),
        (ChatBody, {"parallel_tool_calls": False}, "parallel_tool_calls", "no tools to call"),
        (ChatBody, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "is another number"),
        (TokenizeBody, {"messages": [USER], "prompt": "x"}, "prompt", "either prompt or messages"),
        (TokenizeBody, {"prompt": None}, "prompt", "either prompt or messages"),
        (TokenizeBody, {"messages": [USER], "add_special_tokens": True}, "add_special_tokens", "not go with messages"),
        (TokenizeBody, {"prompt": "x", "tools": [TOOL]}, "tools", "not go with prompt"),
        # what the client may fill as it likes
        (ChatBody, {"chat_template_kwargs": DEEP}, "chat_template_kwargs", f"more than {MOST_DEPTH} levels deep"),
        (ChatBody, {"chat_template_kwargs": {"a": "x" * 70_000}}, "chat_template_kwargs", "the most are 65536"),
        (ChatBody, {"chat_template_kwargs": {"a": [HALF]}}, "chat_template_kwargs", "half a surrogate pair"),
        (ChatBody, {"chat_template_kwargs": {HALF: 1}}, "chat_template_kwargs", "half a surrogate pair"),
        (DetokenizeBody, {"tokens": [5, -1]}, "tokens", "number 1 is -1; expected a token id"),
        (DetokenizeBody, {"tokens": [5, "6"]}, "tokens", "number 1 is '6'"),
        (DetokenizeBody, {"tokens": "5"}, "tokens", "expected a list of token ids"),
    ],
    ids=lambda value: str(value)[:60].encode(errors="replace").decode(),
)
def test_a_refusal_names_the_field_and_what_is_wrong_with_it(
    kind: type, change: dict[str, Any], param: str, says: str
) -> None:
    base = COMPLETION if kind is CompletionBody else CHAT if kind is ChatBody else {}
    found = refused(kind, base | change)
    assert (found.status, found.param) == (400, param)
    assert says in str(found)


def test_what_is_equal_or_within_its_limits_is_taken() -> None:
    assert ChatBody.model_validate(CHAT | {"max_tokens": 3, "max_completion_tokens": 3}).max_tokens == 3
    assert ChatBody.model_validate(CHAT | {"top_logprobs": 0}).alternatives is None
    assert ChatBody.model_validate(CHAT | {"chat_template_kwargs": DEEP["a"]})
    assert len(CompletionBody.model_validate({"prompt": ["x"] * 64, "n": 2}).prompt) == 64
    assert CompletionBody.model_validate({"prompt": [5, 6]}).prompt == [[5, 6]]
    assert CompletionBody.model_validate(COMPLETION | {"stop": "x"}).stop == ["x"]
    assert ChatBody.model_validate(CHAT | {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k"})


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/completions", {"prompt": HALF}, "prompt"),
        ("/v1/completions", {"prompt": ["x", HALF]}, "prompt"),
        ("/v1/completions", COMPLETION | {"stop": HALF}, "stop"),
        ("/v1/completions", COMPLETION | {"user": HALF}, "user"),
        ("/v1/completions", COMPLETION | {"model": HALF}, "model"),
        ("/v1/chat/completions", {"messages": [USER | {"content": HALF}]}, "messages.0.content"),
        (
            "/v1/chat/completions",
            {"messages": [USER | {"content": [{"type": "text", "text": HALF}]}]},
            "messages.0.content.0.text",
        ),
        ("/v1/chat/completions", CHAT | {"tools": [{"type": "function", "function": {"name": HALF}}]}, None),
        ("/v1/chat/completions", CHAT | {"response_format": {"type": "regex", "regex": HALF}}, "response_format.regex"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": HALF}]}]},
            "messages.0.tool_calls.0.id",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}],
                    }
                ]
            },
            "messages",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[" * 100_000}}],
                    }
                ]
            },
            "messages",
        ),
        ("/tokenize", {"prompt": HALF}, "prompt"),
        ("/tokenize", {"messages": [USER | {"content": HALF}]}, "messages.0.content"),
    ],
    ids=lambda value: str(value)[:60].encode(errors="replace").decode(),
)
def test_half_a_character_is_refused_wherever_it_stands(
    route: str, body: dict[str, Any], param: str | None, server: Running
) -> None:
    answer = httpx.post(
        server.url + route, content=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == 400
    assert param in (None, answer.json()["error"]["param"])


@pytest.mark.parametrize(
    ("content", "headers", "says"),
    [
        (b'{"prompt": "x"}', {}, "send the header `Content-Type: application/json`"),
        (b'"x"', {"Content-Type": "application/json"}, "is not a JSON object"),
        (b"", {"Content-Type": "application/json"}, "the body is empty"),
        (b"{", {"Content-Type": "application/json"}, "the body is not JSON"),
    ],
)
def test_a_body_that_is_no_object_is_told_so(
    content: bytes, headers: dict[str, str], says: str, server: Running
) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_the_clients_own_messages_are_its_next_history(client: Any) -> None:
    said = client.chat.completions.create(model="tiny", messages=[USER], max_tokens=4).choices[0].message
    history = [USER, said.model_dump() | {"content": "y"}, said.model_dump(exclude_none=True) | {"content": "y"}, USER]
    again = client.chat.completions.create(
        model="tiny", messages=history, max_tokens=4, n=None, stop=None, presence_penalty=None, store=False, user="me"
    )
    assert again.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"chat_template": "{{ 'a' * 30000000 }}"}, "is the server's to set"),
        ({"tokenize": True}, "is the server's to set"),
        ({"conversation": []}, "is the server's to set"),
        ({"conversations": []}, "is the server's to set"),
        ({"messages": []}, "is the server's to set"),
        ({"tools": []}, "is the server's to set"),
        ({"add_generation_prompt": False}, "is the server's to set"),
        ({"tokenizer_kwargs": {}}, "is the server's to set"),
        ({"self": 1}, "has no such variable"),
        ({"shout": 3}, "has no such variable"),
    ],
    ids=str,
)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/tokenize"])
def test_a_template_gets_its_own_variables_alone(given: dict[str, Any], says: str, route: str, server: Running) -> None:
    answer = httpx.post(server.url + route, json=CHAT | {"chat_template_kwargs": given}, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["param"] == f"chat_template_kwargs.{next(iter(given))}"


def test_a_variable_of_the_template_reaches_it(server: Running) -> None:
    counts = [
        httpx.post(f"{server.url}/tokenize", json=CHAT | {"chat_template_kwargs": {"shouts": n}}).json()["count"]
        for n in (0, 3)
    ]
    assert counts[1] - counts[0] == 3


class Letters:
    """A tokenizer of "a" and "abc" that counts how often it is called."""

    chat_template = "{% for m in messages %}{{ m.content * times }}{% endfor %}"
    called = 0

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "abc": 1}

    def apply_chat_template(
        self, conversation: Any, tokenize: bool, add_generation_prompt: bool, **variables: int
    ) -> str:
        return "".join(each["content"] for each in conversation) * variables["times"]

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        self.called += 1
        return {"input_ids": [0] * 5}


@pytest.mark.parametrize(("longest", "most"), [(None, 9), (4, 4)])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(longest: int | None, most: int) -> None:
    tokenizer = Letters()
    prompts = Prompts(tokenizer, 2, 10, longest)
    says = f"has {3 * most + 1} characters; a prompt has at most {most} tokens .* of 3 characters or fewer"
    with pytest.raises(Refusal, match=f"prompt {says}") as caught:
        prompts.of_completion(CompletionBody.model_validate({"prompt": "a" * (3 * most + 1)}))
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"times": 3 * most + 1}}
    with pytest.raises(Refusal, match=f"messages {says}"):
        prompts.of_chat(ChatBody.model_validate(body))
    assert tokenizer.called == 0
    assert prompts.encode("a" * 3 * most, "prompt") == [0] * 5


def test_a_chat_and_its_count_agree() -> None:
    asked = {
        "messages": [{"role": "developer", "content": "be"}, USER],
        "tools": [TOOL, {"type": "function", "function": {"name": "g"}}],
        "tool_choice": {"type": "function", "function": {"name": "g"}},
        "chat_template_kwargs": {"shouts": 2},
    }
    with running(tiny("llama", max_position_embeddings=2048), template=KNOWING) as server:
        counted = httpx.post(f"{server.url}/tokenize", json=asked).json()
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked | {"max_tokens": 1}, timeout=60).json()
    assert counted["count"] == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("template", "messages", "param"),
    [
        ("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", [USER | {"name": "Ann"}], "messages.0.name"),
        ("{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}", [USER | {"name": "Ann"}], None),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            [USER, {"role": "tool", "name": "f", "content": "1"}],
            None,
        ),
    ],
)
def test_a_name_is_written_or_refused(template: str, messages: list[Any], param: str | None) -> None:
    with running(template=template) as server:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", json={"messages": messages, "max_tokens": 1}, timeout=60
        )
    assert answer.status_code == (200 if param is None else 400)
    if param is not None:
        assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("route", ["embeddings", "responses"])
def test_routes_of_openai_that_are_not_here_say_why(route: str, server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/{route}", json={"input": "x"})
    assert answer.status_code == 404
    assert f"no {route} here: this server" in answer.json()["error"]["message"]
