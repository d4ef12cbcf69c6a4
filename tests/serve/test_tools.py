"""Tools: what a template is given, what an answer is held to, and which calls are found in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from autotune.serve.schema import ChatBody
from autotune.serve.tools import HERMES, LLAMA, UNTOLD, Call, CallReader, ToolUse, conversation, rooted, style_of
from tests.models import EOS, tiny
from tests.serve.servers import Running, running

TOLD = (
    "{% if tools %}tools: {% for t in tools %}{{ t | tojson }}{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}{% endfor %}>"
)
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
LLAMAS = "{% if tools %}{'name': .., \"parameters\": ..}{% endif %}" + PLAIN
PARAMETERS = {
    "type": "object",
    "properties": {"town": {"enum": ["Ulm", "Bonn"]}},
    "required": ["town"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a town", "parameters": PARAMETERS},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
USER = {"role": "user", "content": "what now"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [USER], "max_tokens": 200, "tools": [WEATHER, CLOCK]}
ONE = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'
# JSON that is none to all clients, or no object with a name
ODD = [
    f"<tool_call>{written}</tool_call>"
    for written in (
        '{"name": ["weather"], "arguments": {}}',
        '{"name": "weather", "arguments": {"x": 1e999}}',
        '{"name": "weather", "arguments": {"x": NaN}}',
        '{"name": "weather", "arguments": {"x": "\\ud83d"}}',
        '{"name": "weather", "arguments": {"x": ' + 5000 * "[" + 5000 * "]" + "}}",
        '["weather"]',
        "{}",
    )
]
ULM = Call("weather", '{"town": "Ulm"}')
CALLED = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
EARLIER: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


def body(**change: Any) -> ChatBody:
    return ChatBody.model_validate(CHAT | change)


def read(text: str, style: Any, size: int) -> tuple[str, list[Call]]:
    """The text and the calls of an answer that comes in pieces."""
    found, shown, calls = CallReader(style, frozenset({"weather", "clock"})), "", list[Call]()
    for at in range(0, len(text), size):
        piece, more = found.add(text[at : at + size])
        shown, calls = shown + piece, calls + more
    piece, more = found.rest()
    return shown + piece, calls + more


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("style", "text", "shown", "calls"),
    [
        (HERMES, ONE, "", [ULM]),
        (HERMES, f"Let me see.\n{ONE}", "Let me see.", [ULM]),
        (HERMES, f'{ONE}\n<tool_call>{{"name": "clock"}}</tool_call>', "", [ULM, Call("clock", "{}")]),
        (HERMES, "a < b and <tool", "a < b and <tool", []),
        (HERMES, ONE[:-5], ONE[:-5], []),  # cut off: no call
        (HERMES, "<tool_call>not json</tool_call> so", "<tool_call>not json</tool_call> so", []),
        (HERMES, ONE.replace("weather", "bomb"), ONE.replace("weather", "bomb"), []),
        (HERMES, ONE.replace('{"town": "Ulm"}', "[1]"), ONE.replace('{"town": "Ulm"}', "[1]"), []),
        (LLAMA, '{"name": "weather", "parameters": {"town": "Ulm"}}', "", [ULM]),
        (LLAMA, '{"name": "bomb", "parameters": {}}', '{"name": "bomb", "parameters": {}}', []),
        (LLAMA, "It is warm {today}.", "It is warm {today}.", []),
        (LLAMA, ' {"name": "clock"', ' {"name": "clock"', []),
        (HERMES, "", "", []),
        (LLAMA, '{"name": {"first": "Ada"}}', '{"name": {"first": "Ada"}}', []),
        *((HERMES, odd, odd, []) for odd in ODD),
    ],
)
def test_calls_are_found_however_an_answer_is_cut(
    style: Any, text: str, shown: str, calls: list[Call], size: int
) -> None:
    got, found = read(text, style, size)
    assert (got.rstrip() if calls else got, found) == (shown, calls)


def test_who_asked_for_one_call_gets_one() -> None:
    text = f'{ONE}\n<tool_call>{{"name": "clock"}}</tool_call>'
    for several, expected in ((True, [ULM, Call("clock", "{}")]), (False, [ULM])):
        use = ToolUse.of(body(parallel_tool_calls=several), TOLD)
        assert use is not None
        assert use.reader().add(text)[1] == expected


@pytest.mark.parametrize("kind", [{}, {"type": "object"}, {"type": ["object", "null"]}], ids=str)
def test_a_call_has_an_object_of_arguments(kind: dict[str, Any]) -> None:
    parameters = {"properties": {"town": {"type": "string"}}} | kind
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    use = ToolUse.of(body(tools=[tool], tool_choice="required"), TOLD)
    assert use is not None
    assert use.form is not None
    assert '"type": "object"' in use.form.grammar.partition('"arguments"')[2]


@pytest.mark.parametrize(("template", "style"), [(TOLD, HERMES), (LLAMAS, LLAMA), (PLAIN, UNTOLD)])
def test_a_template_says_how_calls_are_written(template: str, style: Any) -> None:
    assert style_of(template) == style


@pytest.mark.parametrize(
    ("change", "functions", "must", "several"),
    [
        ({}, ["weather", "clock"], False, True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ["weather", "clock"], False, False),
        ({"tool_choice": "required"}, ["weather", "clock"], True, True),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, ["clock"], True, False),
        ({"tool_choice": "none"}, None, False, False),
        ({"tools": None}, None, False, False),
        ({"tools": [], "tool_choice": "auto"}, None, False, False),
    ],
)
def test_what_may_be_called(change: dict[str, Any], functions: list[str] | None, must: bool, several: bool) -> None:
    use = ToolUse.of(body(**change), TOLD)
    if functions is None:
        assert use is None
        return
    assert use is not None
    assert ([each.name for each in use.functions], use.must, use.several) == (functions, must, several)
    assert (use.form is not None) is must


def test_a_model_whose_template_knows_no_tools_is_told_in_a_message() -> None:
    use = ToolUse.of(body(), PLAIN)
    for messages in ([USER], [{"role": "system", "content": "be brief"}, USER]):
        said = conversation(body(messages=messages).messages, use, PLAIN)
        assert [each["role"] for each in said] == ["system", "user"]
        assert all(each in said[0]["content"] for each in ('"name": "weather"', "of a town", "<tool_call>"))
    assert "be brief" in said[0]["content"]
    assert conversation(body().messages, ToolUse.of(body(), TOLD), TOLD) == [USER]


def test_calls_and_results_of_before_are_told_as_the_template_takes_them() -> None:
    messages = body(messages=EARLIER).messages
    known = conversation(messages, ToolUse.of(body(), TOLD), TOLD)
    assert known[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"town": "Ulm"}}
    assert known[2] == {"role": "tool", "content": "rain", "tool_call_id": "c1"}
    unknown = conversation(messages, None, PLAIN)
    assert unknown[1]["content"] == ONE
    assert unknown[2] == {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}


@pytest.mark.parametrize(("template", "role"), [(PLAIN, "system"), (PLAIN + "{# developer #}", "developer")])
def test_a_developer_is_the_system_to_a_template_that_does_not_know_him(template: str, role: str) -> None:
    messages = body(messages=[{"role": "developer", "content": "be brief"}, USER]).messages
    assert conversation(messages, None, template)[0] == {"role": role, "content": "be brief"}


@pytest.fixture(scope="module", params=[TOLD, LLAMAS, PLAIN], ids=["told", "llama", "untold"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(tiny("llama", max_position_embeddings=2048), template=request.param) as found:
        yield found


def answered(got: Any) -> tuple[str, list[Any], str]:
    """The text, the calls and the reason of an answer, whole or streamed."""
    if isinstance(got, openai.Stream):
        chunks = [chunk.choices[0] for chunk in got]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert [call.index for call in calls] == list(range(len(calls)))
        return "".join(chunk.delta.content or "" for chunk in chunks).strip(), calls, chunks[-1].finish_reason
    (choice,) = got.choices
    return (choice.message.content or "").strip(), choice.message.tool_calls or [], choice.finish_reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_call_that_must_be_made_is_made(choice: Any, stream: bool, client: Any) -> None:
    """By a random model, of which nothing else can be expected."""
    got = client.chat.completions.create(
        **CHAT, tool_choice=choice, temperature=0, parallel_tool_calls=False, stream=stream
    )
    content, made, reason = answered(got)
    assert (content, reason, len(made)) == ("", "tool_calls", 1)
    assert made[0].id.startswith("call_")
    assert made[0].function.name in ("weather", "clock")
    if made[0].function.name == "weather":
        assert json.loads(made[0].function.arguments)["town"] in ("Ulm", "Bonn")


def test_a_call_that_is_cut_off_is_text_and_says_length(client: Any) -> None:
    got = client.chat.completions.create(**CHAT | {"max_tokens": 5}, tool_choice="required", temperature=0)
    assert got.choices[0].finish_reason == "length"
    assert not got.choices[0].message.tool_calls


def test_a_model_that_is_free_to_answer_answers_with_text(client: Any) -> None:
    got = client.chat.completions.create(**CHAT | {"max_tokens": 8}, temperature=0)
    assert got.choices[0].finish_reason in ("length", "stop")
    assert not got.choices[0].message.tool_calls
    again = client.chat.completions.create(**CHAT | {"max_tokens": 8, "messages": EARLIER}, temperature=0)
    assert again.choices[0].message.content is not None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_calls_of_a_model_that_is_free_to_answer_are_found(
    choice: str | None, stream: bool, server: Running, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, forward = server.served.prompts.tokenizer, server.model.lm_head.forward
    style = style_of(server.served.prompts.template)
    before = "Let me see." if style.begin else ""
    text = before + (ONE if style.begin else '{"name": "weather", "parameters": {"town": "Ulm"}}')
    to_come = iter([*tokenizer(text, add_special_tokens=False)["input_ids"], EOS])

    def written(*args: Any) -> torch.Tensor:
        logits = torch.zeros_like(forward(*args))
        logits[..., next(to_come)] = 1.0
        return logits

    monkeypatch.setattr(server.model.lm_head, "forward", written)
    more = {} if choice is None else {"tool_choice": choice}
    content, made, reason = answered(client.chat.completions.create(**CHAT, **more, temperature=0, stream=stream))
    if choice == "none":
        assert (content, made, reason) == (text, [], "stop")
        return
    assert (content, reason, [call.function.name for call in made]) == (before, "tool_calls", ["weather"])
    assert json.loads(made[0].function.arguments) == {"town": "Ulm"}


def nested(**parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "go", "parameters": {"type": "object"} | parameters}}


CLOSED: dict[str, Any] = {"required": ["to"], "additionalProperties": False}
TOWN = nested(properties={"to": {"$ref": "#/$defs/Town"}}, **{"$defs": {"Town": {"enum": ["Ulm", "Bonn"]}}}, **CLOSED)
OWN = nested(**TOWN["function"]["parameters"], **{"$id": "https://example.org/go"})
PATH = nested(properties={"to": {"enum": [1]}, "then": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, **CLOSED)


@pytest.mark.parametrize(
    ("tool", "towns"),
    [(TOWN, ("Ulm", "Bonn")), (OWN, ("Ulm", "Bonn")), (PATH, (1,))],
    ids=["definitions", "definitions of an id", "itself"],
)
def test_parameters_may_refer_to_parts_of_themselves(tool: Any, towns: tuple[Any, ...], client: Any) -> None:
    asked = CHAT | {"tools": [CLOCK, tool], "max_tokens": 400}
    for choice in ("required", {"type": "function", "function": {"name": "go"}}):
        got = client.chat.completions.create(**asked, tool_choice=choice, temperature=0, parallel_tool_calls=False)
        made = got.choices[0].message.tool_calls
        if isinstance(choice, dict):
            given = json.loads(made[0].function.arguments)
            assert given["to"] in towns
            assert set(given) <= {"to", "then"}


@pytest.mark.parametrize(
    ("tool", "arguments", "fits"),
    [
        (TOWN, {"to": "Ulm"}, True),
        (TOWN, {"to": "Rome"}, False),
        (OWN, {"to": "Ulm"}, True),
        (OWN, {"to": "Rome"}, False),
        (PATH, {"to": 1, "then": {"to": 1, "then": {"to": 1}}}, True),
        (PATH, {"to": 1, "then": {"to": 2}}, False),
        (PATH, {"to": 1, "then": {"name": "clock", "arguments": {}}}, False),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_form_takes_what_parameters_that_refer_to_themselves_take(
    tool: Any, arguments: dict[str, Any], fits: bool, server: Running
) -> None:
    prompts = server.served.prompts
    use = ToolUse.of(body(tools=[CLOCK, tool], tool_choice="required"), prompts.template)
    assert use is not None
    style = use.style
    call = json.dumps({"name": "go", style.arguments: arguments})
    text = f"{style.begin}\n{call}\n{style.end}" if style.begin else call
    tokens = prompts.tokenizer(text, add_special_tokens=False)["input_ids"]
    grammar = server.served.grammars.of(use.form, False, "tools")
    assert grammar is not None
    assert (grammar._matcher.deep_copy().try_consume_tokens(tokens) == len(tokens)) is fits


@pytest.mark.parametrize(
    ("schema", "moved"),
    [
        ({"$ref": "#"}, {"$ref": "#/here"}),
        ({"$ref": "#/$defs/a"}, {"$ref": "#/here/$defs/a"}),
        ({"$ref": "#anchor"}, {"$ref": "#anchor"}),
        ({"$ref": "https://example.org/a#/b"}, {"$ref": "https://example.org/a#/b"}),
        ({"anyOf": [{"$ref": "#/a"}, True]}, {"anyOf": [{"$ref": "#/here/a"}, True]}),
        ({"enum": [{"$ref": "#/a"}]}, {"enum": [{"$ref": "#/a"}]}),
        ({"properties": {"enum": {"$ref": "#/a"}}}, {"properties": {"enum": {"$ref": "#/here/a"}}}),
        ({"properties": {"$ref": {"type": "string"}}}, {"properties": {"$ref": {"type": "string"}}}),
        ({"$id": "urn:a", "items": {"$ref": "#/a"}}, {"$id": "urn:a", "items": {"$ref": "#/a"}}),
        ({"$id": "#a", "items": {"$ref": "#/a"}}, {"$id": "#a", "items": {"$ref": "#/here/a"}}),
        ({"properties": {"$id": {"$ref": "#/a"}}}, {"properties": {"$id": {"$ref": "#/here/a"}}}),
    ],
)
def test_references_hold_where_a_schema_is_put(schema: Any, moved: Any) -> None:
    assert rooted(schema, "#/here") == moved


def of_type(kind: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}


NO_OBJECTS: tuple[Any, ...] = ("array", "objekt", None, True, 5, 1.5, [], [None, 1], [["object"]], {"object": 1})
LIST = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "["}}


@pytest.mark.parametrize(
    ("change", "says", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "there are none in tools", "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tools has weather, clock", "tool_choice"),
        ({"tools": [CLOCK, CLOCK]}, "two functions that are called clock", "tools"),
        ({"response_format": {"type": "json_object"}}, "exclude each other", "response_format"),
        ({"tool_choice": "perhaps"}, "tool_choice", None),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern", None),
        *(({"tools": [of_type(kind)]}, "the parameters of f are of type", "tools") for kind in NO_OBJECTS),
        ({"messages": [{"role": "user"}]}, "content is missing", None),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALLED]}]}, "are an assistant's", None),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [LIST]}]}, "are not a JSON object", "messages"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_tools_is_said(
    change: dict[str, Any], says: str, param: str | None, server: Running
) -> None:
    got = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | change, timeout=60)
    assert got.status_code == 400
    error = got.json()["error"]
    assert says in error["message"]
    assert param in (None, error["param"])
