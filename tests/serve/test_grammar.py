"""Answers that keep to a form, whatever a random model would rather say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from autotune.serve import grammar
from tests.models import tiny
from tests.serve.servers import Running, running

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a colour"}], "max_tokens": 200}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["red", "green"]}, "parts": {"type": "array", "items": {"type": "boolean"}}},
    "required": ["name", "parts"],
    "additionalProperties": False,
}
SHORT = SCHEMA | {
    "properties": SCHEMA["properties"] | {"parts": {"type": "array", "maxItems": 2, "items": {"type": "boolean"}}}
}
LARK = 'start: "it is " colour\ncolour: "red" | "blue"'


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def post(server: Running, path: str = "chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=CHAT | body if path.startswith("chat") else body, timeout=60)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("stream", [False, True])
def test_json_by_a_schema(stream: bool, sampling: dict[str, Any], client: Any) -> None:
    got = client.chat.completions.create(**CHAT, **sampling, response_format=of_schema(SHORT), stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in got]
        text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
    else:
        text, reason = got.choices[0].message.content, got.choices[0].finish_reason
    found = json.loads(text)
    assert set(found) == {"name", "parts"}
    assert found["name"] in ("red", "green")
    assert all(isinstance(part, bool) for part in found["parts"])
    assert reason == "stop"


def test_answers_to_one_prompt_keep_to_the_form_each(client: Any) -> None:
    form: Any = {"type": "regex", "regex": "[a-z]{9}"}
    got = client.chat.completions.create(**CHAT, n=4, temperature=1.5, seed=1, response_format=form)
    texts = [choice.message.content for choice in got.choices]
    assert all(re.fullmatch("[a-z]{9}", text) for text in texts)
    assert len(set(texts)) == 4


def test_the_clients_own_way_to_parse(client: Any) -> None:
    class Colour(BaseModel):
        red: bool

    got = client.chat.completions.parse(**CHAT, temperature=0, response_format=Colour)
    assert isinstance(got.choices[0].message.parsed, Colour)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"type": "regex", "regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"type": "grammar", "grammar": LARK}, "it is (red|blue)"),
    ],
    ids=["regex", "grammar"],
)
def test_patterns_and_grammars(form: dict[str, Any], pattern: str, server: Running) -> None:
    whole = post(server, response_format=form).json()["choices"][0]
    assert re.fullmatch(pattern, whole["message"]["content"])
    plain = post(server, "completions", prompt="ab", max_tokens=40, response_format=form).json()["choices"][0]
    assert re.fullmatch(pattern, plain["text"])
    assert whole["finish_reason"] == plain["finish_reason"] == "stop"


def test_any_json_object_begins_as_one_and_a_short_answer_says_so(server: Running) -> None:
    cut = post(server, response_format={"type": "json_object"}, max_tokens=1).json()["choices"][0]
    assert cut["message"]["content"] == "{"
    assert cut["finish_reason"] == "length"


def test_no_bias_gets_past_a_form(server: Running) -> None:
    wanted = server.served.prompts.encode("z", "prompt")[0]
    form = {"type": "regex", "regex": "[ab]{5}"}
    got = post(server, response_format=form, logit_bias={str(wanted): 100}, temperature=0).json()["choices"][0]
    assert re.fullmatch("[ab]{5}", got["message"]["content"])


def test_log_probabilities_are_the_models_own(server: Running) -> None:
    """They are noted before a form takes anything away."""
    form = {"type": "regex", "regex": "[ab]{2}"}
    got = post(server, response_format=form, temperature=0, logprobs=True, top_logprobs=1).json()["choices"][0]
    first = got["logprobs"]["content"][0]
    assert first["logprob"] <= first["top_logprobs"][0]["logprob"]
    free = post(server, temperature=0, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"][0]
    assert first["top_logprobs"] == free["top_logprobs"]


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (of_schema({"type": "objekt"}), "Invalid type: objekt"),
        ({"type": "regex", "regex": "a(b"}, "invalid regex"),
        ({"type": "grammar", "grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"type": "regex", "regex": "a" * 70_000}, "has 70000 characters; the most are 65536"),
        ({"type": "yaml"}, "response_format"),
        ({"type": "json_schema"}, "json_schema"),
        ({"type": "json_object", "shape": 1}, "unknown field response_format.shape"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_form_is_refused_before_anything_is_written(form: dict[str, Any], says: str, server: Running) -> None:
    got = post(server, response_format=form)
    assert got.status_code == 400
    error = got.json()["error"]
    assert says in error["message"]
    assert error["param"].startswith("response_format")
    assert post(server).status_code == 200


def test_a_form_without_end_is_refused(server: Running) -> None:
    got = post(server, response_format={"type": "json_object"}, ignore_eos=True)
    assert got.status_code == 400
    assert "exclude each other" in got.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_becomes_too_complex_ends_its_answer_alone(
    stream: bool, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grammar.LIMITS, "step_lexer_fuel", 1)
    form = {"type": "regex", "regex": f"abc[a-z]{{1,60}}(x|y[0-9]{{3,40}}z){{2,{20 + stream}}}"}  # not compiled before
    got = post(server, response_format=form, stream=stream)
    assert got.status_code == (200 if stream else 400)
    assert "too complex to go on: lexer error" in got.text
    assert got.text.count('"content":"') == (4 if stream else 0)  # the role's, and a, b, c
    assert post(server).status_code == 200


def test_a_form_that_the_vocabulary_cannot_write_ends_its_answer_with_the_reason(server: Running) -> None:
    """The tiny vocabulary has no token for the byte that must follow 0xf3 here."""
    form = {"type": "regex", "regex": "\\w{1,60}"}
    biases = {str(token): 100 for token in server.served.prompts.tokenizer.convert_tokens_to_ids(["\u00f3"])}
    got = post(server, response_format=form, logit_bias=biases, temperature=0)
    assert got.status_code == 400
    assert "the model's vocabulary lacks a byte that the form needs" in got.json()["error"]["message"]
    assert post(server).status_code == 200


def test_without_llguidance_the_reason_says_what_to_install(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    got = post(server, response_format={"type": "json_object"})
    assert got.status_code == 400
    assert "autotune-inference[grammar]" in got.json()["error"]["message"]


def test_a_model_without_an_end_cannot_complete_a_form() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with running(model) as server:
        server.served.grammars._eos.clear()
        got = post(server, response_format={"type": "json_object"})
        assert got.status_code == 400
        assert "no token that ends an answer" in got.json()["error"]["message"]
