"""Whose turn the model is: the engine's, for a step, or that of one caller whom the engine does not serve."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...machine.ending import Cancelled
from .terms import LOOK_S, await_turn


class ModelTurns:
    """Gives the model to the engine and to callers who need it alone, in turn: neither waits for two of the other's.

    Args:
        changed: is notified of all changes.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._holder: int | None = None  # identifier of the thread whose turn it is: the engine's, or a caller's
        self._borrowers = 0  # such callers that wait
        self._is_wanted = False  # whether the engine waits
        self._owns_next = False  # whether the next turn is the engine's, if it waits, even if such callers do

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Enclose a call that the engine does not take: no step runs meanwhile. Calls within it have the same turn.

        Raises:
            RequestError: the terms of the request that the thread serves were violated while it waited.
        """
        if self.is_here():
            yield
            return
        with self._changed:
            self._borrowers += 1
            try:
                await_turn(self._changed, lambda: self._holder is None and not (self._is_wanted and self._owns_next))
            except BaseException:
                self._changed.notify_all()  # the engine may have let it go first
                raise
            finally:
                self._borrowers -= 1
            self._holder = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._holder = None
                self._owns_next = True
                self._changed.notify_all()

    def is_here(self) -> bool:
        """Whether it is the calling thread's turn. In the engine's, a caller's logits processor may call the model."""
        return self._holder == threading.get_ident()

    def begin(self, is_stopped: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Begin the engine's turn, or wait for it. The lock is held.

        Args:
            meanwhile: called every now and then while it waits.

        Raises:
            Cancelled: the engine was stopped.
        """
        self._is_wanted = True
        try:
            while not (is_stopped() or (self._holder is None and (self._owns_next or not self._borrowers))):
                meanwhile()
                self._changed.wait(LOOK_S)
        finally:
            self._is_wanted = False
            self._changed.notify_all()  # if it was stopped, those who let it go first need not
        if is_stopped():
            raise Cancelled
        self._owns_next = False
        self._holder = threading.get_ident()

    def end(self) -> None:
        """End the engine's turn."""
        with self._changed:
            self._holder = None
            self._changed.notify_all()
