"""A lock among processes, on a file. The kernel frees it when its holder ends, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FileLock:
    """A lock among processes. A process must open a file's lock once only: closing any of its descriptors frees it.

    Args:
        path: the file, which is created and stays.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def take(self) -> bool:
        """Take the lock, or keep it. Returns False if another process has it.

        Raises:
            OSError: the file system has no locks.
        """
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def give(self) -> None:
        """Let another process take the lock."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Free the lock and forget the file."""
        os.close(self._descriptor)
