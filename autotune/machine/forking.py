"""After a fork the child has one thread: what the others were doing has ended, and the locks they held are free.
Files that may not be shared with it are closed for the moment.

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


class Holder(Protocol):
    """Has something open that may not be in two processes at once."""

    def before_fork(self) -> None:
        """Called by the thread that is about to fork: close it, and let nobody open it."""

    def after_fork(self) -> None:
        """Called in parent and child: it may be opened again."""


Kept = TypeVar("Kept")
_locks = weakref.WeakSet[Any]()
_owners = weakref.WeakSet[Owner]()
_holders = weakref.WeakSet[Holder]()
_held: list[Holder] = []  # while a fork is under way


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


def let_go(holder: Holder) -> None:
    """Call `holder.before_fork` before every fork of this process, and `holder.after_fork` after it."""
    _holders.add(holder)


def _before() -> None:
    for holder in tuple(_holders):
        holder.before_fork()
        _held.append(holder)


def _after() -> None:
    while _held:
        _held.pop().after_fork()


def _in_child() -> None:
    for each in tuple(_locks):
        each._at_fork_reinit()  # what the standard library does with its own
    _after()
    for owner in tuple(_owners):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
