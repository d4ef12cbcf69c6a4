"""One search at a time: processes that share a cache directory, and would find the same plan, wait for the first one.

Replicas of a service start together. If each searched, each would measure a machine that the others keep busy, and all
but one would search for nothing. The lock is the kernel's: it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

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
        descriptor: of the open lock file; None: there is no cache to share.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def take(self) -> bool:
        """Try to be the one that searches."""
        if self._descriptor is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # another process has it
            return False
        except OSError:  # a file system without locks: search, as if alone
            return True
        return True


@contextmanager
def turn(fingerprint: Fingerprint | None) -> Iterator[Turn]:
    """Enclose a search. Whoever took the turn gives it back at the end. None: nobody else is to wait."""
    descriptor = None
    if fingerprint is not None and (path := store.path_for(fingerprint)) is not None:
        with suppress(OSError):
            descriptor = _opened(path.with_suffix(SUFFIX))
    try:
        yield Turn(descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def awaited(
    mine: Turn,
    fingerprint: Fingerprint,
    most_s: float,
    notify: Callable[[str], None],
    rest: Callable[[float], bool],
) -> Plan | None:
    """Wait for this process's turn. Returns the plan that another one found meanwhile, or None if it is our turn.

    Args:
        mine: from `turn`.
        most_s: seconds after which it is our turn whatever the other process does.
        notify: called with a sentence if there is something to wait for.
        rest: waits so many seconds; returns whether tuning was cancelled, which ends the waiting.
    """
    if mine.take():
        return None
    notify("another process is tuning this model on this machine: waiting for its plan")
    end = time.monotonic() + most_s
    while not rest(ASK_EVERY_S):
        taken = mine.take()
        found = store.find(fingerprint)  # after the lock: the other one saves its plan before it gives that back
        if found is not None:
            return found
        if taken:
            return None
        if time.monotonic() >= end:
            notify(f"the other process has been tuning for {most_s:.0f} s: tuning beside it")
            return None
    return None


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
