"""The interface in OpenAPI: forms of answers and errors, and the keys that routes ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict

from .gate import OPEN
from .refusal import KINDS

SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
OF_GATE = (408, 413, 500)  # what any route may answer: a body that is late or too large, and a fault of the server
ID = {"X-Request-ID": {"description": "the request's id", "required": True, "schema": {"type": "string"}}}
LATER = {"Retry-After": {"description": "seconds to wait", "required": True, "schema": {"type": "integer"}}}
CHALLENGE = {"WWW-Authenticate": {"description": "how to send a key", "required": True, "schema": {"type": "string"}}}
OF_STATUS = {"401": CHALLENGE, "429": LATER, "503": LATER}  # headers of errors
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM: dict[int | str, Any] = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Shape):
    error: ErrorDetail


class TokenUsage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Shape):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: TokenUsage


class Alternative(Shape):
    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(Shape):
    content: list[ChosenToken]


class MadeFunction(Shape):
    name: str
    arguments: str


class MadeCall(Shape):
    id: str
    type: Literal["function"]
    function: MadeFunction


class AnswerMessage(Shape):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[MadeCall] | None = None


class ChatChoice(Shape):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatAnswer(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class TokensAnswer(Shape):
    count: int
    max_model_len: int
    tokens: list[int]


class TextAnswer(Shape):
    prompt: str


def errors(*statuses: int) -> dict[int | str, Any]:
    """Responses of a route beside its answer: errors in OpenAI's form."""
    return {status: {"model": ErrorAnswer, "description": _described(status)} for status in statuses}


def json_body(schema: dict[str, Any], text: str) -> dict[str, Any]:
    """The description of a body that a route reads by itself."""
    return {"requestBody": {"description": text, "required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, keys: Sequence[str]) -> None:
    """Have the app's description say that errors are JSON everywhere, what the gate answers, and who needs a key.

    Args:
        app: each of its routes has a response `default`, the form of errors.
        keys: if there are none, no route asks for one.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    asks = bool(keys) and path not in OPEN
                    operation["responses"] = _responses(operation["responses"], asks)
                    if keys and not asks:
                        operation["security"] = []
            if keys:
                found["components"]["securitySchemes"] = SCHEMES
                found["security"] = [{name: []} for name in SCHEMES]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _responses(found: dict[str, Any], asks_for_key: bool) -> dict[str, Any]:
    """All responses of a route by status, from FastAPI's and their `default`, which would allow any status."""
    error = found["default"]
    of_gate = (401, *OF_GATE) if asks_for_key else OF_GATE
    every = {str(status): error | {"description": _described(status)} for status in of_gate} | found
    return {
        status: _response(status, response, error) for status, response in sorted(every.items()) if status != "default"
    }


def _response(status: str, response: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    """One response with its headers. FastAPI describes errors in the media type of the route's answer."""
    (form, *_) = response["content"].values()
    of_refusal = OF_STATUS.get(status, {}) if form == next(iter(error["content"].values())) else {}
    content = response["content"] if status.startswith("2") else {"application/json": form}
    return response | {"content": content, "headers": ID | of_refusal}


def _described(status: int) -> str:
    return KINDS.get(status, "server_error").replace("_", " ")
