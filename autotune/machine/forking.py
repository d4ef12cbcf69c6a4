"""Forks of the process. The child has one thread: work of the other threads has ended, and their locks are freed.
Files that parent and child must not share are closed during the fork.

Servers load a model, wrap it and fork their workers, perhaps while it is being tuned. Without this module a worker
would wait for a thread that it does not have.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol, TypeVar


class Owner(Protocol):
    """Has work that runs in a background thread."""

    def after_fork(self) -> None:
        """Called in the child, where no other thread exists."""


class Holder(Protocol):
    """Has something open that two processes must not share."""

    def before_fork(self) -> None:
        """Called by the thread that is about to fork: close it, and do not let others open it."""

    def after_fork(self) -> None:
        """Called in parent and child: it may be opened again."""


Kept = TypeVar("Kept")
_locks = weakref.WeakSet[Any]()
_owners = weakref.WeakSet[Owner]()
_holders = weakref.WeakSet[Holder]()
_held: list[Holder] = []  # holders closed by the fork in progress


def free(lock: Kept) -> Kept:
    """Register a lock or condition that becomes free in a child, even if another thread held it. Returns it."""
    _locks.add(lock)
    return lock


def lock() -> threading.Lock:
    """Make a lock that becomes free in a child."""
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
        each._at_fork_reinit()  # as the standard library does with its own locks
    _after()
    for owner in tuple(_owners):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
