"""Where autotune keeps what it may lose: plans, compiled kernels, the converted demo model."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("autotune")


def cache(name: str = "") -> Path | None:
    """The user's cache directory, or its subdirectory `name`, created and private (0700).

    The first of $AUTOTUNE_CACHE_DIR, $XDG_CACHE_HOME/autotune and ~/.cache/autotune that is set decides. Where it
    cannot be written, a temporary directory that lasts as long as the process takes its place, with one warning; None
    where even that fails: callers go on without a cache.
    """
    chosen, problem = _chosen(), "there is no home directory"
    if chosen is not None:
        try:
            return _made(chosen, name)
        except OSError as error:
            problem = str(error)
    temporary = _temporary()
    if temporary is None:
        warn_once(f"no cache is kept: {problem}, and there is no temporary directory; set AUTOTUNE_CACHE_DIR")
        return None
    warn_once(
        f"the cache lasts only as long as this process: {problem}; set AUTOTUNE_CACHE_DIR to a writable directory"
    )
    return _made(temporary, name)


def _chosen() -> Path | None:
    if own := os.environ.get("AUTOTUNE_CACHE_DIR"):
        return Path(own).expanduser()
    if (shared := os.environ.get("XDG_CACHE_HOME")) and Path(shared).is_absolute():  # the XDG rule: others are ignored
        return Path(shared) / "autotune"
    try:
        return Path.home() / ".cache" / "autotune"
    except RuntimeError:
        return None


def _made(root: Path, name: str) -> Path:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = root / name
    folder.mkdir(mode=0o700, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder


@functools.cache
def _temporary() -> Path | None:
    try:
        folder = tempfile.mkdtemp(prefix="autotune-")
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning unless this process already has."""
    logger.warning(message)


def write(path: Path, content: bytes) -> None:
    """All or nothing, also when the process or the machine dies: a private temporary file, synced, then renamed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def read(path: Path, most_bytes: int) -> bytes:
    """The content of a regular, reasonably small file that only this user can have written.

    Raises:
        OSError: it cannot be opened, is a link, a directory or no regular file, is too large, or it or its directory is
            not this user's alone; FileNotFoundError: there is none.
    """
    _require_private(os.stat(path.parent), "its directory")
    with open(path, "rb", opener=_open_unlinked) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        _require_private(status, "it")
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(f"it is larger than {most_bytes >> 20} MB")
    return content


def _open_unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not block


def _require_private(status: os.stat_result, what: str) -> None:
    if status.st_uid != os.getuid():
        raise OSError(f"{what} belongs to user {status.st_uid}, not to this one")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{what} can be written by other users; expected mode 0600, and 0700 for the directory")
