"""A stream of server-sent events as a response."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING

from starlette.responses import StreamingResponse

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx holds events back otherwise
    "X-Content-Type-Options": "nosniff",
}


class EventStream(StreamingResponse):
    """Events whose source is closed when the client goes.

    Args:
        first: the first event; whoever waited for it could still answer with an error.
        rest: the source of the others.
    """

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes]) -> None:
        self._rest = rest
        super().__init__(_chained(first, rest), media_type="text/event-stream", headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._rest.aclose()


async def _chained(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event
