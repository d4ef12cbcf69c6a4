"""A connection that has to say what it wants: uvicorn alone waits without end for the first bytes and for headers."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 20.0  # seconds within which the headers of a request must have arrived, after its first byte or the start


class TimedConnection(H11Protocol):
    """An HTTP/1.1 connection that is closed if the headers of a request do not arrive in time.

    Between two requests it may be silent for as long as uvicorn's `timeout_keep_alive` says.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self._is_between():
            self._expect()
        super().data_received(data)
        if not self._is_between():
            self._calm()

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
