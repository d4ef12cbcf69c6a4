"""Where autotune keeps what it may lose: plans, compiled kernels, the converted demo model."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
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
