"""After a fork the child has one thread: what the others were doing has ended, and the locks they held are free.

Servers load a model, wrap it and fork their workers, perhaps while it is being tuned. Without this a worker would wait
for a thread that it does not have.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol, TypeVar


class Owner(Protocol):
    """Has something that a thread of its own works at."""

    def after_fork(self) -> None:
        """Called in the child: no other thread is there any more."""


Kept = TypeVar("Kept")
_locks = weakref.WeakSet[Any]()
_owners = weakref.WeakSet[Owner]()


def free(lock: Kept) -> Kept:
    """The same lock or condition, which is free in a child whoever held it."""
    _locks.add(lock)
    return lock


def lock() -> threading.Lock:
    """A lock that is free in a child."""
    return free(threading.Lock())


def tell(owner: Owner) -> None:
    """Call `owner.after_fork` in a child, once all locks are free."""
    _owners.add(owner)


def _in_child() -> None:
    for each in tuple(_locks):
        each._at_fork_reinit()  # what the standard library does with its own
    for owner in tuple(_owners):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
