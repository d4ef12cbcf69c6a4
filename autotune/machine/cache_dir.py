"""The cache directory, for files that may be lost: plans, compiled kernels, the converted demo model.

Files there are run (compiled code) or trusted (plans, weights), so no other user may have put them there.
`require_private` checks every folder and `require_own` every file: only this user's own files are used.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

logger = logging.getLogger("autotune")

LEFT_S = 3600.0  # seconds after which a draft counts as abandoned: no write or compilation takes so long


def cache(name: str = "", *, lasting: bool = False) -> Path | None:
    """The user's cache directory, or its subdirectory `name`, created and private (0700).

    The first of $AUTOTUNE_CACHE_DIR, $XDG_CACHE_HOME/autotune and ~/.cache/autotune that is set decides. If it cannot
    be written, or if others can write there, a temporary directory replaces it until the process ends, with one
    warning. Returns None if even that fails: callers continue without a cache.

    Args:
        lasting: return None instead of the temporary directory, for large files that only help later processes.
    """
    try:
        return _made(_chosen(), name)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        problem = str(error)
    if lasting:
        logger.debug("%s is not kept: %s", name, problem)
        return None
    wanted = "set AUTOTUNE_CACHE_DIR to a writable directory of this user's alone"
    try:
        found = _made(_temporary(), name)
    except OSError as error:
        warn_once(f"no cache is kept: {problem}, and there is no temporary directory ({error}); {wanted}")
        return None
    warn_once(f"the cache lasts only as long as this process: {problem}; {wanted}")
    return found


def expanded(path: str | Path) -> Path:
    """A path with `~` replaced by the home directory; unchanged if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _chosen() -> Path:
    if own := os.environ.get("AUTOTUNE_CACHE_DIR"):
        return Path(own).expanduser()
    if (shared := os.environ.get("XDG_CACHE_HOME")) and Path(shared).is_absolute():  # XDG: relative paths are ignored
        return Path(shared) / "autotune"
    return Path.home() / ".cache" / "autotune"


def _made(root: Path, name: str) -> Path:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_private(root)
    folder = root / name
    if name:
        folder.mkdir(mode=0o700, exist_ok=True)
        require_private(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder


@functools.cache
def _temporary() -> Path:
    folder, maker = tempfile.mkdtemp(prefix="autotune-"), os.getpid()

    def remove() -> None:
        if os.getpid() == maker:  # a forked child shares it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning unless this process already has."""
    logger.warning(message)


def write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write all or nothing, even if the process or machine dies: a private temporary file, synced, then renamed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def sweep(drafts: Iterable[Path]) -> None:
    """Remove drafts that killed processes left: those too old for any process to be still writing them."""
    for draft in drafts:
        with suppress(OSError):
            if time.time() - draft.lstat().st_mtime > LEFT_S:
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def read(path: Path, most_bytes: int) -> bytes:
    """Read a file through `opened`. Raises the errors of `opened`."""
    with opened(path, most_bytes) as (file, size):
        return file.read(size)


@contextmanager
def opened(path: Path, most_bytes: int) -> Iterator[tuple[IO[bytes], int]]:
    """Open a regular file of limited size that only this user can have written. Yields it and its size in bytes.

    Raises:
        OSError: as in `require_own`, or it cannot be opened, or is too large; FileNotFoundError: there is none.
    """
    require_private(path.parent)
    with open(path, "rb", opener=_open_unlinked) as file:
        status = os.fstat(file.fileno())
        _require_own(status)
        if status.st_size > most_bytes:
            raise OSError(f"it is larger than {most_bytes >> 20} MB")
        yield file, status.st_size


def require_own(path: Path) -> os.stat_result:
    """Refuse a file that someone else can have written or put there. For files to be run or loaded by name.

    Returns:
        The file's status.

    Raises:
        OSError: it is a link, a directory or no regular file, or it or its directory is not this user's alone;
            FileNotFoundError: there is none.
    """
    require_private(path.parent)
    status = os.lstat(path)
    _require_own(status)
    return status


def require_private(folder: Path) -> None:
    """Refuse a folder in which someone else can add, replace or remove files.

    Raises:
        OSError: it is a link, belongs to someone else, or can be written by others; or everybody can write to a folder
            above it and so rename it (a sticky folder, such as /tmp, prevents that). FileNotFoundError: there is none.
    """
    status = os.lstat(folder)
    if stat.S_ISLNK(status.st_mode):
        raise OSError(f"{folder} is a link; expected a directory")
    _require_private(status, folder, "0700")
    for above in folder.resolve().parents:
        if os.stat(above).st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            raise OSError(f"{folder} can be exchanged by other users, who can write to {above}")


def _open_unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not block


def _require_own(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a regular file")
    _require_private(status, "it", "0600")


def _require_private(status: os.stat_result, what: object, mode: str) -> None:
    if status.st_uid != os.getuid():
        raise OSError(f"{what} belongs to user {status.st_uid}, not to this one")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{what} can be written by other users; expected mode {mode}")
