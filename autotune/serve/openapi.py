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


def describe(app: FastAPI, keys: Sequence[str]) -> None:
    """Have the app's description say that errors are JSON everywhere, and which routes ask for a key.

    Args:
        keys: if there are none, no route asks for one.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _as_json(found)
            app.openapi_schema = _with_keys(found) if keys else found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _as_json(found: dict[str, Any]) -> None:
    """FastAPI describes errors in the media type of the route's answer."""
    for operations in found["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if not status.startswith("2"):
                    response["content"] = {"application/json": next(iter(response["content"].values()))}


def _with_keys(found: dict[str, Any]) -> dict[str, Any]:
    found["components"]["securitySchemes"] = SCHEMES
    found["security"] = [{name: []} for name in SCHEMES]
    for path, operations in found["paths"].items():
        for operation in operations.values():
            if path in OPEN:
                operation["security"] = []
            else:
                default = operation["responses"]["default"]
                operation["responses"]["401"] = {**default, "description": _described(401)}
    return found


def _described(status: int) -> str:
    return KINDS.get(status, "server_error").replace("_", " ")
