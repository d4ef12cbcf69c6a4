"""What is wrong with a body, in a sentence with the field's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .refusal import Refusal

if TYPE_CHECKING:
    from fastapi.exceptions import RequestValidationError

OWN = ("value_error", "wrong", "missing")  # errors that say themselves what was found


def refusal_of(error: RequestValidationError) -> Refusal:
    """The refusal of a body.

    A field that may have several types has errors for each; the one that got furthest into the body says most.
    """
    first = max(error.errors(), key=lambda each: len(each["loc"]))
    kind, context = first["type"], first.get("ctx", {})
    if kind == "json_invalid":
        return Refusal(400, f"the body is not JSON: {context.get('error', first['msg'])}")
    field = ".".join(path(first["loc"][1:], error.body, kind == "missing", context.get("field"))) or None
    if field is None:
        return Refusal(400, _of_body(error.body))
    if kind == "unknown":
        advice = f"did you mean {near}?" if (near := context.get("near")) else "leave it out"
        return Refusal(400, f"unknown field {field}: this server does not know it; {advice}", field)
    if kind == "string_unicode":
        return Refusal(400, f"{field}: it has half a surrogate pair, which is no text; send whole characters", field)
    if kind in OWN:
        return Refusal(400, f"{field}: {context.get('error', first['msg'])}", field)
    return Refusal(400, f"{field}: {first['msg']}{_seen(first.get('input'))}", field)


def _seen(value: Any) -> str:
    """What was found in a field, if it is short enough to be told."""
    if isinstance(value, dict | list) and value:
        return ""
    return ", and it is " + f"{value!r:.40}".encode(errors="backslashreplace").decode()


def path(where: Sequence[int | str], body: Any, missing: bool, last: str | None = None) -> list[str]:
    """The names of a field and of what encloses it.

    Args:
        where: an error's path. What of it is not in the body is the name of a type of several that were tried.
        body: JSON.
        missing: whether the path ends with a field that the body lacks.
        last: a field within the one that the path ends with.
    """
    found = []
    for number, part in enumerate(where):
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and part in range(len(body))):
            body = body[part]  # type: ignore[index]  # a list has numbers, as was just seen
        elif not (missing and number == len(where) - 1):
            continue
        found.append(str(part))
    return found if last is None else [*found, last]


def _of_body(body: Any) -> str:
    if isinstance(body, bytes):
        return "the body is not declared as JSON; send the header `Content-Type: application/json`"
    return "the body is empty; expected a JSON object" if body is None else "the body is not a JSON object"
