"""The one thread that captures graphs for all other threads, and runs those that inductor captures.

Inductor keeps the state of its graphs in the thread that made them, and refuses calls from others (pytorch#123177). The
handles and workspaces of libraries belong to a thread, too, so that captures on one thread take them once. A graph that
autotune captured has no thread: `Device.replaying` replays it from any, without the two switches of threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol, TypeVar

from .. import ending, forking

T = TypeVar("T")


class Queue(Protocol):
    """The part of a device that a `GraphThread` needs; see `base.Device`."""

    where: Any

    @property
    def queueing(self) -> AbstractContextManager[Any]: ...

    def check(self) -> None: ...

    def mark(self) -> Any: ...

    def wait(self, mark: Any) -> None: ...

    def stream(self) -> AbstractContextManager[None]: ...


class GraphThread:
    """Runs work for other threads, one piece at a time, on the device's own stream.

    Args:
        device: its queue keeps the callers' and the owner's work in order.
    """

    def __init__(self, device: Queue) -> None:
        self.device = device
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread: ending.Worker | None = None
        self._starting = forking.lock()

    def run(self, work: Callable[[], T], *, queued: bool = True) -> T:
        """Run `work` on the owner thread, after what the caller queued before and ahead of what it queues later.

        Tensors that `work` reads or writes for the caller must belong to the caller: their memory is then freed in the
        order of the caller's stream.

        Args:
            queued: whether nobody else may queue work for the device meanwhile, and `work` queues on the device's own
                stream. Not for a compilation, which takes minutes, in which other threads go on replaying graphs.

        Raises:
            DeviceError: the device is dead. Exceptions of `work` are raised, too.
        """
        self.device.check()
        if self._thread is threading.current_thread():
            return work()
        if not self._start():
            ending.refuse(RuntimeError("the process ends, and with it the thread that replays graphs"))
        before, done = self.device.mark(), Future[tuple[T, Any]]()

        def ordered() -> tuple[T, Any]:
            with ExitStack() as held:
                if queued:
                    held.enter_context(self.device.queueing)
                    held.enter_context(self.device.stream())
                self.device.wait(before)
                return work(), self.device.mark()

        self._work.put((ordered, done))
        result, after = done.result()
        self.device.wait(after)
        return result

    def _start(self) -> bool:
        """Start the thread if it does not run. Returns False if the process ends."""
        with self._starting:
            if self._thread is None or not self._thread.is_alive():  # none is alive after a fork
                name = f"autotune graphs {self.device.where}"
                worker = ending.Worker(self._serve, name, stop=lambda: self._work.put(None), serves=True)
                if not worker.launch():
                    return False
                self._thread = worker
            return True

    def _serve(self) -> None:
        while (piece := self._work.get()) is not None:
            work, done = piece
            try:
                done.set_result(work())
            except BaseException as error:  # the caller handles it
                done.set_exception(error)
            del piece, work, done  # do not keep their objects alive until the next piece comes
