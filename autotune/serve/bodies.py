"""Large bodies, which are read, validated and written in a thread. 4 MiB of token ids take 0.2 s; the loop goes on."""

from __future__ import annotations

import email.message
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio.to_thread
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

# Bytes of a body that is read in the event loop. A chat's shortest messages have 30 bytes and take 14 us each to
# validate: 8 ms. Handing a body to a thread takes 0.1 ms.
INLINE = 16 * 2**10

# Parts of an answer that is written in the event loop. A token with the logarithm of its probability takes 12 us.
FEW = 256

# What JSONResponse writes.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class BodyRoute(APIRoute):
    """A route whose large bodies are read in a thread. What it answers is the same."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]  # FastAPI awaits it
        handle = super().get_route_handler()
        kind = self.body_field.field_info.annotation if self.body_field is not None else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return handle

        async def handler(request: Request) -> Response:
            body = await request.body()
            if len(body) > INLINE and _is_json(request):
                read = await anyio.to_thread.run_sync(read_body, body, kind)
                request = _ReadRequest(request, body, read)
            return await handle(request)

        return handler


def read_body(body: bytes, kind: type[BaseModel]) -> BaseModel | Exception:
    """Read and validate a body.

    Returns:
        What FastAPI takes in place of its JSON; or what reading it as JSON raised.

    Raises:
        RequestValidationError: it is JSON of another form.
    """
    try:
        found = json.loads(body, parse_int=_integer, object_hook=_same)
    except Exception as error:  # FastAPI says what is wrong
        return error
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        wrong = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise RequestValidationError(wrong, body=found) from None


async def respond(make: Callable[[], dict[str, Any]], parts: int) -> Response:
    """Respond with a JSON object. One of many parts is made and written in a thread.

    Args:
        make: returns the object.
        parts: how many things it lists, about.
    """
    if parts <= FEW:
        return JSONResponse(make())
    return Response(await anyio.to_thread.run_sync(lambda: write_body(make())), media_type="application/json")


def write_body(found: dict[str, Any]) -> bytes:
    """Write JSON. `iterencode` is Python, so that other threads get their turns; `dumps` holds the GIL to its end."""
    return "".join(_ENCODER.iterencode(found)).encode()


def _integer(text: str) -> int:
    """Read an integer. While the scanner calls Python, other threads get their turns; by itself it holds the GIL."""
    return int(text)


def _same(found: dict[str, Any]) -> dict[str, Any]:
    """Return an object as it is; for the same reason."""
    return found


def _is_json(request: Request) -> bool:
    message = email.message.Message()
    message["content-type"] = request.headers.get("content-type", "")
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


class _ReadRequest(Request):
    """A request whose body was read."""

    def __init__(self, request: Request, body: bytes, read: BaseModel | Exception) -> None:
        super().__init__(request.scope, request.receive)
        self._read_bytes = body
        self._read = read

    async def body(self) -> bytes:
        return self._read_bytes

    async def json(self) -> Any:
        if isinstance(self._read, Exception):
            raise self._read
        return self._read
