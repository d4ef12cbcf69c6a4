"""Wake asyncio event loops from other threads: once for all that came together.

A loop is woken by a byte on a pipe, which lets go of the interpreter's lock: so after the first of several wakes, the
thread that had more to tell would have to wait for the lock.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Bell:
    """Wakes those who wait in one event loop.

    Args:
        loop: the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._events = deque[asyncio.Event]()

    def ring(self, event: asyncio.Event) -> None:
        """Set an event of the loop, from any thread: now, or at the end of the thread's `together`."""
        self._events.append(event)
        held: set[Bell] | None = getattr(_thread, "held", None)
        if held is None:
            self.sound()
        else:
            held.add(self)

    def sound(self) -> None:
        """Wake the loop. Nobody waits in one that was closed."""
        if (loop := self._loop()) is not None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        while self._events:
            self._events.popleft().set()


_thread = threading.local()
_bells: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bell] = weakref.WeakKeyDictionary()


def of_this_loop() -> Bell:
    """The bell of the event loop that runs in this thread."""
    return _bells.setdefault(loop := asyncio.get_running_loop(), Bell(loop))


@contextmanager
def together() -> Iterator[None]:
    """Within this context, this thread's bells wait, and each then rings once."""
    _thread.held = held = set[Bell]()
    try:
        yield
    finally:
        _thread.held = None
        for bell in held:
            bell.sound()
