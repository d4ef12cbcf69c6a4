"""Tools that a model may call: how a chat tells of them, how calls are written, and how they are read.

Two ways to write a call are known, by the model's chat template: as Hermes and Qwen do, `<tool_call>` around JSON with
a name and arguments, and as Llama does, the whole answer as JSON with a name and parameters. A model whose template
knows no tools is told of them in a message, and asked to write as Hermes does.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .detokenise import doubtful
from .fields import bounded
from .forms import Lark
from .grammar import SPACED
from .refusal import Refusal
from .schema import NamedChoice

if TYPE_CHECKING:
    from .schema import Function, Message, Templated

PARAM = "tools"
MOST_SHOWN = 40  # characters of a wrong value in a message
# Words of JSON Schema below which there is no schema, and those below which there are schemas by name.
VALUES = frozenset({"const", "default", "enum", "examples"})
NAMED = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
NONE: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}  # parameters left out
TOLD = """You may call functions. Here are their signatures, one in a line:
{signatures}
For each call write a JSON object with the function's name and arguments between these marks:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


@dataclass(frozen=True)
class Style:
    """How a model writes calls.

    Args:
        begin, end: marks around a call; empty if the whole answer is one.
        arguments: the key of a call's arguments.
        told: whether the template tells of tools; otherwise a message does.
    """

    begin: str
    end: str
    arguments: str
    told: bool = True


HERMES = Style("<tool_call>", "</tool_call>", "arguments")
LLAMA = Style("", "", "parameters")
UNTOLD = Style("<tool_call>", "</tool_call>", "arguments", told=False)


def style_of(template: str) -> Style:
    """How a model with this chat template writes calls."""
    if "tools" in template and "<tool_call>" in template:
        return HERMES
    if "tools" in template and ("<|python_tag|>" in template or '"parameters"' in template):
        return LLAMA
    return UNTOLD


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request.

    Args:
        functions: that may be called.
        style: how the model writes calls.
        must: whether the answer must be a call.
        several: whether it may be more than one.
    """

    functions: tuple[Function, ...]
    style: Style
    must: bool
    several: bool

    @classmethod
    def of(cls, body: Templated, template: str) -> ToolUse | None:
        """The tools that a chat asks for; None if there are none to call.

        Raises:
            Refusal: `tool_choice` needs tools, or names one that is not there.
        """
        choice, functions = body.tool_choice, tuple(tool.function for tool in body.tools or ())
        if not functions:
            if choice in (None, "none", "auto"):
                return None
            raise Refusal(400, "tool_choice asks for a tool, and there are none in tools", "tool_choice")
        names = [function.name for function in functions]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise Refusal(400, f"tools has two functions that are called {twice}; names must differ", PARAM)
        if choice == "none":
            return None
        if isinstance(choice, NamedChoice):
            functions = tuple(each for each in functions if each.name == choice.function.name)
            if not functions:
                raise Refusal(
                    400, f"tool_choice names {choice.function.name}; tools has {', '.join(names)}", "tool_choice"
                )
        for function in functions:
            kind = (function.parameters or NONE).get("type", "object")
            if "object" not in (kind if isinstance(kind, list) else [kind]):
                found = json.dumps(kind)[:MOST_SHOWN]
                said = f"the parameters of {function.name} are of type {found}; a call has an object of arguments"
                raise Refusal(400, said, PARAM)
        must = isinstance(choice, NamedChoice) or choice == "required"
        style = style_of(template)
        several = body.parallel_tool_calls and not isinstance(choice, NamedChoice) and bool(style.begin)
        return cls(functions, style, must, several)

    @property
    def form(self) -> Lark | None:
        """What the answer is held to; None if it may be any text."""
        if not self.must:
            return None
        place = self.style.arguments
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": each.name},
                    place: rooted(
                        {**(each.parameters or NONE), "type": "object"}, f"#/anyOf/{number}/properties/{place}"
                    ),
                },
                "required": ["name", place],
                "additionalProperties": False,
            }
            for number, each in enumerate(self.functions)
        ]
        body = json.dumps({"x-guidance": SPACED, "anyOf": calls}, ensure_ascii=False)
        begin, end = (json.dumps(mark) for mark in (f"{self.style.begin}\n", f"\n{self.style.end}"))
        call = f"{begin} body {end}" if self.style.begin else "body"
        more = ' ("\\n" call)*' if self.several else ""
        return Lark(type="grammar", grammar=f"start: call{more}\ncall: {call}\nbody: %json {body}\n")

    @property
    def signatures(self) -> list[dict[str, Any]]:
        """What a template is given."""
        return [{"type": "function", "function": each.model_dump(exclude_none=True)} for each in self.functions]

    def reader(self) -> CallReader:
        """What finds the calls in one answer."""
        return CallReader(self.style, frozenset(each.name for each in self.functions), self.several)


def rooted(schema: Any, root: str, *, are_names: bool = False) -> Any:
    """Copy a JSON schema to another place: references into it begin at `root` then, as "#/properties/town".

    A part with an `$id` stays as it is: references below it begin at that part, wherever it lies.

    Args:
        are_names: whether its keys are names of schemas, as below "properties", and not words of the language.
    """
    if isinstance(schema, list):
        return [rooted(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    own = None if are_names else schema.get("$id")
    if isinstance(own, str) and not own.startswith("#"):  # that is an anchor in earlier drafts
        return schema
    moved = {}
    for key, value in schema.items():
        if are_names:
            moved[key] = rooted(value, root)
        elif key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[key] = root + value[1:]
        else:
            moved[key] = value if key in VALUES else rooted(value, root, are_names=key in NAMED)
    return moved


def conversation(messages: Sequence[Message], use: ToolUse | None, template: str) -> list[dict[str, Any]]:
    """The messages as a template takes them, with calls and results, and with the tools if the template has no place.

    A developer's message is the system's to a template that does not know developers.

    Raises:
        Refusal: a call's arguments are not a JSON object.
    """
    style = use.style if use is not None else style_of(template)
    developer = "developer" if "developer" in template else "system"
    said = [_said(message, style, developer) for message in messages]
    if use is not None and not style.told:
        told = TOLD.format(signatures="\n".join(json.dumps(each, ensure_ascii=False) for each in use.signatures))
        if said[0]["role"] == "system":
            said[0] = {"role": "system", "content": f"{said[0]['content']}\n\n{told}"}
        else:
            said.insert(0, {"role": "system", "content": told})
    return said


def _said(message: Message, style: Style, developer: str) -> dict[str, Any]:
    role = developer if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        found["name"] = message.name
    calls = []
    for call in message.tool_calls or ():
        try:
            arguments = bounded(json.loads(call.function.arguments or "{}"))
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise Refusal(400, f"the arguments of a call to {call.function.name} are not a JSON object", "messages")
        calls.append({"name": call.function.name, "arguments": arguments})
    if style.told:
        if calls:
            found["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        if message.role == "tool" and message.tool_call_id:
            found["tool_call_id"] = message.tool_call_id
        return found
    if calls:
        written = (f"{style.begin}\n{json.dumps(call, ensure_ascii=False)}\n{style.end}" for call in calls)
        found["content"] = "\n".join(filter(None, [message.text, *written]))
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.text}\n</tool_response>"}
    return found


@dataclass(frozen=True)
class Call:
    """One call that an answer makes.

    Args:
        name: of the function.
        arguments: JSON.
    """

    name: str
    arguments: str

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class CallReader:
    """Takes the calls out of a growing answer. What only looks like one stays text.

    Args:
        style: how calls are written.
        names: of the functions.
        several: whether there may be more than one call; else those after the first are dropped.
    """

    def __init__(self, style: Style, names: frozenset[str], several: bool = True) -> None:
        self._style = style
        self._names = names
        self._several = several
        self._called = False
        self._held = ""
        self._inside = not style.begin  # whether what is held may be a call

    def add(self, piece: str) -> tuple[str, list[Call]]:
        """The text that can be shown now, and the calls that are whole."""
        self._held += piece
        if not self._style.begin:
            if self._inside and self._held.lstrip()[:1] not in ("", "{"):
                self._inside = False
            return ("", []) if self._inside else (self._take(len(self._held)), [])
        shown, calls = "", list[Call]()
        while True:
            if not self._inside:
                at = self._held.find(self._style.begin)
                if at < 0:
                    kept = doubtful(self._held, [self._style.begin])
                    return shown + self._take(len(self._held) - kept), calls
                shown += self._take(at)
                self._inside = True
            at = self._held.find(self._style.end)
            if at < 0:
                return shown, calls
            written = self._take(at + len(self._style.end))
            self._inside = False
            call = self._call(written[len(self._style.begin) : at])
            if call is None:
                shown += written
            else:
                calls += [call] if self._several or not self._called else []
                self._called = True
                shown = shown.rstrip()  # the white space before and between calls is none of the answer's

    def rest(self) -> tuple[str, list[Call]]:
        """What was held back, when no more comes: text, or a call without marks."""
        written, self._held = self._held, ""
        call = self._call(written) if not self._style.begin else None
        return (written, []) if call is None else ("", [call])

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _call(self, text: str) -> Call | None:
        try:
            found = json.loads(text)
            name, arguments = found["name"], found.get(self._style.arguments, {})
            if not (isinstance(name, str) and name in self._names and isinstance(arguments, dict)):
                return None
            written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            written.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # no JSON, or none that every client reads: half a character, a number beyond all bounds
        return Call(name, written)
