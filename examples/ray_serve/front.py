"""The front: reads a request's body, has a replica answer it, and asks another one if that dies before it has begun.

Ray's proxy routes a request before its body has arrived, so that it cannot know the prompt. The front can. It holds no
model and imports neither torch nor autotune.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError

from .affinity import beginning

MOST_BYTES = 4 * 2**20  # of a body; a replica's own limit
INLINE = 16 * 2**10  # bytes of a body that is read in the event loop
TRIES = 5  # replicas that may die under one request
KEPT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")

# What a stream ends with whose replica died, in the form that OpenAI's clients read.
LOST = b"""data: {"error":{"message":"the replica that answered has died; ask again",\
"type":"server_error","param":null,"code":"replica_lost"}}

data: [DONE]

"""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def build() -> Callable[[Message, Receive, Send], Awaitable[None]]:
    """The front's ASGI app."""
    models = serve.get_deployment_handle("Model").options(method_name="answer", stream=True)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            body = await _body(receive)
            if body is not None:
                plain = {name: scope[name] for name in KEPT if name in scope}
                await _relay(models, plain, body, send)

    return app


async def _body(receive: Receive) -> bytes | None:
    """Read a body, a little beyond the limit at most: the replica refuses it then. None: the client went."""
    parts, size = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if not message.get("more_body") or size > MOST_BYTES:
            return b"".join(parts)[: MOST_BYTES + 1]


async def _relay(models: Any, scope: Message, body: bytes, send: Send) -> None:
    """Send a replica's answer on. One that dies before it has sent anything is replaced by another.

    If it dies in the middle of a stream, that ends with an error event.

    Raises:
        RayActorError: it died in the middle of another answer, or too many died.
    """
    key = await _beginning(body) if scope["method"] == "POST" else None
    for left in reversed(range(TRIES)):
        has_begun = is_stream = is_whole = False
        answer = models.remote(scope, body, key=key)
        try:
            async with aclosing(_messages(answer)) as messages:
                async for message in messages:
                    has_begun, is_stream = True, is_stream or _begins_stream(message)
                    is_whole = message["type"] == "http.response.body" and not message.get("more_body")
                    await send(message)
        except (RayActorError, ReplicaUnavailableError):
            if is_whole:
                return
            if is_stream:
                await send({"type": "http.response.body", "body": LOST, "more_body": False})
                return
            if has_begun or not left:
                raise
        else:
            return


async def _beginning(body: bytes) -> str | None:
    return beginning(body) if len(body) <= INLINE else await asyncio.to_thread(beginning, body)


def _begins_stream(message: Message) -> bool:
    """Whether a message is the head of server-sent events."""
    return any(name == b"content-type" and b"text/event-stream" in kind for name, kind in message.get("headers", ()))


async def _messages(answer: Any) -> Any:
    """Yield the messages of an answer; closing the iterator ends the answer."""
    has_ended = False
    try:
        async for several in answer:
            for message in several:
                yield message
        has_ended = True
    finally:
        if not has_ended:
            answer.cancel()
