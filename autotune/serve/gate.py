"""What every HTTP request passes before its route: an id, keys, limits of size and time; it is counted and logged."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any

from . import logs
from .keys import checked
from .refusal import Refusal

if TYPE_CHECKING:
    from .metrics import Metrics
    from .traces import Traces

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

WORK = ("/v1/", "/tokenize", "/detokenize")  # requests for the model
FAILED = 400  # the least status of an error
LINGER_S = 2.0  # seconds that the client of a refused request gets to send what is left of its body
PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})
OPEN = frozenset({"/livez", "/", "/page.css", "/page.js", "/icon.svg"})  # need no key: they hold no data
ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # ids of callers that are taken over


@dataclass(frozen=True)
class HttpLimits:
    """What a request may take.

    Args:
        body_bytes: most bytes of a body.
        body_s: seconds within which a body must have arrived.
        write_s: seconds after which a client is dropped that took nothing of its answer.
    """

    body_bytes: int = 4 * 2**20
    body_s: float = 20.0
    write_s: float = 60.0


class Gate:
    """An ASGI app around another one.

    Args:
        app: what serves the requests that pass.
        keys: API keys, any of which opens every route; none: no key is asked for.
        limits: of size and time.
        metrics: counts answers.
        routes: known paths; the others are counted as one.
        traces: makes spans of requests.
        ending: set once no further request is taken.

    Attributes:
        limits: of size and time.
        under_way: requests for the model that are being answered.
    """

    def __init__(
        self,
        app: App,
        keys: Sequence[str],
        limits: HttpLimits,
        metrics: Metrics,
        routes: Sequence[str],
        traces: Traces,
        ending: Event,
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in checked(keys, "a server")]
        self.limits = limits
        self._metrics = metrics
        self._routes = {route for route in routes if "{" not in route}
        self._families = [route for route in routes if "{" in route]
        self._traces = traces
        self.ending = ending
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 500
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if ID.fullmatch(given) else uuid.uuid4().hex
        logs.CURRENT.set(logs.RequestContext(request_id, began))  # until the task ends: uvicorn logs what is raised

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        path = self._label(scope["path"])
        try:
            with self._traces.request(scope["method"], path, headers, request_id) as noted:
                try:
                    await self._served(scope, headers, receive, answer)
                except ClientGone:
                    status = 499
                finally:
                    noted["http.response.status_code"] = status
        finally:
            seconds = time.monotonic() - began
            self._metrics.answered(path, status)
            is_plain = path in PROBES and status < FAILED  # asked for every few seconds
            record = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4)}
            logs.event("request", logging.DEBUG if is_plain else logging.INFO, **record)

    def _label(self, path: str) -> str:
        """The route of a path, for figures and the log; "other" if there is none."""
        if path in self._routes:
            return path
        return next((each for each in self._families if path.startswith(each[: each.index("{")])), "other")

    async def _served(self, scope: Scope, headers: MutableMapping[str, str], receive: Receive, answer: Send) -> None:
        try:
            with self._admitted(scope["path"], headers):
                body = await self._body(headers, receive)
                await self._app(scope, replayed(body, receive), answer)
        except Refusal as refusal:  # the app answers its own
            await refusal.response({"connection": "close"})(scope, receive, after_body(receive, answer))

    @contextmanager
    def _admitted(self, path: str, headers: MutableMapping[str, str]) -> Iterator[None]:
        """Refuse a request, or count it as under way if it is one for the model."""
        if path not in OPEN and self._keys and not self._is_known(headers):
            raise Refusal(401, "no valid API key; send it as `Authorization: Bearer KEY`", code="invalid_api_key")
        is_work = path.startswith(WORK)
        if self.ending.is_set() and is_work:
            raise Refusal(503, "the server is ending; ask another one", code="ending")
        self.under_way += is_work
        try:
            yield
        finally:
            self.under_way -= is_work

    def _is_known(self, headers: MutableMapping[str, str]) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        offered = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        fits = [hmac.compare_digest(offered.encode(), known) for known in self._keys]  # in a time that tells nothing
        return any(fits)

    async def _body(self, headers: MutableMapping[str, str], receive: Receive) -> bytes:
        most = self.limits.body_bytes
        said = headers.get("content-length", "0")
        if said.isdecimal() and int(said) > most:
            raise Refusal(413, f"the body has {said} bytes; the most are {most}")
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise Refusal(413, f"the body has more than {most} bytes, the most")
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.limits.body_s:g} s") from None


class ClientGone(Exception):  # noqa: N818 - nothing went wrong
    """The client closed the connection before it had sent its body."""


def after_body(receive: Receive, send: Send) -> Send:
    """A `send` that ends a response once the body of its request was read, and thrown away, or `LINGER_S` are over.

    A connection that is closed over bytes that nobody read is reset, and its client may lose the response.
    """

    async def last(message: Message) -> None:
        if message["type"] == "http.response.body":
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    while (await receive()).get("more_body"):
                        pass
            message = {"type": "http.response.body"}
        await send(message)

    return last


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, then whatever comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
