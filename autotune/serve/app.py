"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Match

from . import page
from .bodies import BodyRoute, respond
from .completions import Chat, Completion, Reply
from .events import EventStream
from .gate import Gate
from .openapi import (
    STREAM,
    ChatAnswer,
    CompletionAnswer,
    ErrorAnswer,
    ModelCard,
    ModelList,
    TextAnswer,
    TokensAnswer,
    describe,
    errors,
)
from .refusal import Refusal
from .rollout import routes as rollout_routes
from .schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from .service import Service
from .tools import ToolUse
from .validation import refusal_of

Result = TypeVar("Result")
OF_BODIES = (400, 404)  # what may be wrong with a body
OF_ANSWERS = (*OF_BODIES, 429, 503)
GONE = 499  # nginx's status for a client that closed the connection


def create_app(served: Service) -> Gate:
    """The ASGI app that serves a model."""
    app = FastAPI(
        title="autotune",
        description="OpenAI's interface over a model that autotune serves",
        version="1",
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        responses={"default": {"model": ErrorAnswer, "description": "an error"}},  # no 422 of FastAPI's; see `describe`
    )
    app.router.route_class = BodyRoute
    describe(app, served.keys)
    _handle_errors(app)
    _operate(app, served)
    page.add_routes(app, served)
    rollout_routes.add_routes(app, served)
    _decline(app)

    @app.get("/v1/models", response_model=ModelList, responses=errors(503))
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_card(served, name) for name in (served.name, *served.aliases)]}

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=errors(404, 503))
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        _known(served, name)
        return _card(served, name)

    @app.post("/v1/completions", response_model=CompletionAnswer, responses=STREAM | errors(*OF_ANSWERS))
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Go on from one prompt or several."""
        _known(served, body.model)

        def prepare() -> Completion:
            prompts = served.prompts.of_completion(body)
            rooms = [served.prompts.room(prompt, body.max_tokens, chat=False) for prompt in prompts]
            grammar = served.grammars.of(body.response_format, body.ignore_eos, "response_format")
            return Completion(served.answers, body, prompts, rooms, served.name, grammar)

        return await _reply(await _in_thread(prepare), body.stream, request)

    @app.post("/v1/chat/completions", response_model=ChatAnswer, responses=STREAM | errors(*OF_ANSWERS))
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a chat."""
        _known(served, body.model)

        def prepare() -> Chat:
            use = ToolUse.of(body, served.prompts.template)
            prompt = served.prompts.of_chat(body, use)
            param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
            room = served.prompts.room(prompt, getattr(body, param), chat=True, param=param)
            form = body.response_format if use is None else use.form
            grammar = served.grammars.of(form, body.ignore_eos, "response_format" if use is None else "tools")
            return Chat(served.answers, body, [prompt], [room], served.name, grammar, use)

        return await _reply(await _in_thread(prepare), body.stream, request)

    @app.post("/tokenize", response_model=TokensAnswer, responses=errors(*OF_BODIES, 503))
    async def tokenize(body: TokenizeBody) -> Response:
        """A text, or a chat through the model's template, as token ids."""
        _known(served, body.model)

        def work() -> list[int]:
            if body.messages is None:
                return served.prompts.encode(body.prompt or "", "prompt", body.add_special_tokens)
            return served.prompts.templated(body.messages, body, ToolUse.of(body, served.prompts.template))

        ids = await _in_thread(work)
        return await respond(
            lambda: {"count": len(ids), "max_model_len": served.prompts.context, "tokens": ids}, len(ids)
        )

    @app.post("/detokenize", response_model=TextAnswer, responses=errors(*OF_BODIES, 503))
    async def detokenize(body: DetokenizeBody) -> Response:
        """Token ids as text."""
        _known(served, body.model)
        return await respond(lambda: {"prompt": served.prompts.decode(body.tokens, "tokens")}, len(body.tokens))

    app.openapi()  # made now: at its first request it would hold the event loop for 0.13 s
    routes = [getattr(route, "path", "") for route in app.routes]
    return Gate(app, served.keys, served.limits, served.metrics, routes, served.answers.traces, served.ending)


def _decline(app: FastAPI) -> None:
    """Routes of OpenAI's that this server does not have say why."""

    async def embeddings() -> None:
        raise Refusal(404, "no embeddings here: this server's model writes text; use /v1/completions")

    async def responses() -> None:
        raise Refusal(404, "no responses here: this server keeps no state; use /v1/chat/completions")

    for path, declined in (("/v1/embeddings", embeddings), ("/v1/responses", responses)):
        app.add_api_route(path, declined, methods=["POST"], include_in_schema=False)


def _operate(app: FastAPI, served: Service) -> None:
    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> PlainTextResponse:
        """Whether the process answers."""
        return PlainTextResponse("ok")

    unready: dict[int | str, Any] = {503: {"model": dict[str, Any], "description": "not ready, and why"}}

    @app.get("/readyz", response_model=dict[str, Any], responses=unready)
    async def readyz() -> JSONResponse:
        """Whether requests should be sent here."""
        reason = served.unready()
        body = {"ready": reason is None, "reason": reason, **served.state()}
        return JSONResponse(body, 200 if reason is None else 503)

    app.add_api_route("/health", readyz, methods=["GET"], response_model=dict[str, Any], responses=unready)
    for path, answer in (("/livez", livez), ("/readyz", readyz), ("/health", readyz)):  # balancers ask so
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(served.metrics.text(served.snapshot()), media_type=CONTENT_TYPE_LATEST)


def _handle_errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)  # noqa: S101 - for the type checker
        return error.response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - the same
        return refusal_of(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - the same
        path = request.url.path
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = _methods(app, request)
            said = f"{path} takes {allowed}, not {request.method}"
            return Refusal(error.status_code, said).response({"Allow": allowed})
        if error.status_code == HTTPStatus.NOT_FOUND:
            return Refusal(error.status_code, f"nothing at {path}; {_near(app, path)}").response()
        return Refusal(error.status_code, str(error.detail)).response(error.headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        return Refusal(500, f"the server failed: {type(error).__name__}").response()

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _methods(app: FastAPI, request: Request) -> str:
    """The methods of a path. Starlette names those of the first of its routes."""
    routes = (route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE)
    return ", ".join(sorted({method for route in routes for method in getattr(route, "methods", None) or ()}))


def _near(app: FastAPI, path: str) -> str:
    """What a path may mean that leads nowhere: clients are often set up without /v1, or with it twice."""
    there = {found for route in app.routes if "{" not in (found := getattr(route, "path", "{"))}
    meant = next((each for each in (f"/v1{path}", path.removeprefix("/v1")) if each in there), None)
    return f"{f'did you mean {meant}? ' if meant else ''}/openapi.json lists what is there"


def _known(served: Service, name: str | None) -> None:
    if not served.knows(name):
        names = ", ".join(map(repr, (served.name, *served.aliases)))
        raise Refusal(404, f"no model {name!r} here; this server has {names}", "model", "model_not_found")


def _card(served: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "autotune",
        "max_model_len": served.prompts.context,
    }


async def _in_thread(work: Callable[[], Result]) -> Result:
    return await anyio.to_thread.run_sync(work)


async def _reply(reply: Reply, stream: bool, request: Request) -> Response:
    if not stream:
        whole = await _unless_gone(reply.all(), request)
        return Response(status_code=GONE) if whole is None else whole
    events = reply.events()
    first = await _unless_gone(anext(events), request)  # an error before it is an HTTP status
    if first is None:
        await events.aclose()
        return Response(status_code=GONE)
    return EventStream(first, events)


async def _unless_gone(work: Awaitable[Result], request: Request) -> Result | None:
    """Wait for some work, but give it up if the client closes the connection; None then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
