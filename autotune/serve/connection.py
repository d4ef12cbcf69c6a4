"""A connection that has to say what it wants, and to take what it gets: uvicorn alone waits for both without end."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .logs import event

HEADERS_S = 20.0  # seconds within which the headers of a request must have arrived, after its first byte or the start


class TimedConnection(H11Protocol):
    """An HTTP/1.1 connection that is closed if headers do not arrive in time, or if its client takes nothing for long.

    Between two requests it may be silent for as long as uvicorn's `timeout_keep_alive` says.

    Args:
        write_s: seconds for which a client may take nothing of what is sent.
        given: uvicorn's own arguments.
    """

    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def __init__(self, *, write_s: float, **given: Any) -> None:
        super().__init__(**given)
        self._write_s = write_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        self._forget_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self._is_between():
            self._expect()
        super().data_received(data)
        if not self._is_between():
            self._calm()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_later(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._forget_unread()
        super().resume_writing()

    def _look_later(self, waits: int) -> None:
        """Look later whether the client has taken some of the bytes that wait to be sent."""
        self._unread = self.loop.call_later(self._write_s, self._drop_if_unread, waits)

    def _drop_if_unread(self, waited: int) -> None:
        if (waits := self.transport.get_write_buffer_size()) < waited:
            self._look_later(waits)
            return
        event("dropped", reason=f"its client took nothing for {self._write_s:g} s", unread_bytes=waits)
        self.transport.abort()  # as if the client had gone: its answer ends, and its row is free

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _is_between(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _expect(self) -> None:
        """Wait for the headers of a request from now on."""
        self._deadline = self.loop.call_later(HEADERS_S, self._close_if_silent)

    def _calm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close_if_silent(self) -> None:
        if self._is_between():
            self.transport.close()
