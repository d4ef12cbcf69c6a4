"""One search at a time: processes that share a cache directory, and would find the same plan, wait for the first one.

Replicas of a service start together. If each searched, each would measure a machine that the others keep busy, and all
but one would search for nothing. The lock is the kernel's: it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ..machine.locking import FileLock
from . import store

if TYPE_CHECKING:
    from .fingerprint import Fingerprint
    from .plan import Plan

SUFFIX = ".lock"  # of the file beside a plan's
ASK_EVERY_S = 0.5
PATIENCE = 3  # how many budgets of a search to wait for one that another process makes


class Turn:
    """Whether this process may search, as one of those that share a cache.

    Args:
        lock: of those processes; None: there is no cache to share.
    """

    def __init__(self, lock: FileLock | None) -> None:
        self._lock = lock

    def take(self) -> bool:
        """Try to be the one that searches."""
        try:
            return self._lock is None or self._lock.take()
        except OSError:  # a file system without locks: search, as if alone
            return True


@contextmanager
def turn(fingerprint: Fingerprint | None) -> Iterator[Turn]:
    """Enclose a search. Whoever took the turn gives it back at the end. None: nobody else is to wait."""
    lock = None
    if fingerprint is not None and (path := store.path_for(fingerprint)) is not None:
        with suppress(OSError):
            lock = FileLock(path.with_suffix(SUFFIX))
    try:
        yield Turn(lock)
    finally:
        if lock is not None:
            lock.close()


def awaited(
    mine: Turn,
    fingerprint: Fingerprint,
    most_s: float,
    notify: Callable[[str], None],
    rest: Callable[[float], bool],
    refused: Plan | None = None,
) -> Plan | None:
    """Wait for this process's turn. Returns the plan that another one found meanwhile, or None if it is our turn.

    Args:
        mine: from `turn`.
        most_s: seconds after which it is our turn whatever the other process does.
        notify: called with a sentence if there is something to wait for.
        rest: waits so many seconds; returns whether tuning was cancelled, which ends the waiting.
        refused: the kept plan that did not hold here; it is not waited for.
    """
    if mine.take():
        return None
    notify("another process is tuning this model on this machine: waiting for its plan")
    end = time.monotonic() + most_s
    while not rest(ASK_EVERY_S):
        taken = mine.take()
        found = store.find(fingerprint)  # after the lock: the other one saves its plan before it gives that back
        if found is not None and (refused is None or found.created != refused.created):
            return found
        if taken:
            return None
        if time.monotonic() >= end:
            notify(f"the other process has been tuning for {most_s:.0f} s: tuning beside it")
            return None
    return None
