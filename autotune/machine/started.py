"""Processes that our threads started, compilers for the most part, and what these leave behind when they are ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 0.5  # seconds after which a process that was asked to end is killed

_asked: dict[int, float] = {}  # processes that were asked to end -> when, by time.monotonic
_torn: dict[int, Path] = {}  # compilers that were asked to end -> the file that they were writing


def kill_group(group: int) -> None:
    with suppress(OSError):
        os.killpg(group, signal.SIGKILL)


def end_started_by(thread: threading.Thread) -> None:
    """End a thread's child processes and their descendants, on Linux only. Torch closes its own pool of compilers.

    They are asked first: a compiler then removes what it has half written. Torch keeps that file under the name of its
    source, and would fail to load it ("file too short") in every later process. A linker that is killed after its
    driver has cleaned up leaves it behind, so the file's name is noted.
    """
    pools = getattr(sys.modules.get("torch._inductor.async_compile"), "_pool_set", ())
    spared = {getattr(getattr(pool, "process", None), "pid", None) for pool in pools}
    for process in _descendants(Path(f"/proc/self/task/{thread.native_id}")):
        if process not in spared:
            now = time.monotonic()
            if (written := _output(process)) is not None:
                _torn[process] = written
            patient = now - _asked.setdefault(process, now) < PATIENCE_S
            with suppress(OSError):
                os.kill(process, signal.SIGTERM if patient else signal.SIGKILL)


def _output(process: int) -> Path | None:
    """The file that a process was told to write (`-o file`), if it is a compiler's."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        return Path(f"/proc/{process}/cwd").readlink() / words[words.index("-o") + 1]
    except (OSError, ValueError, IndexError):
        return None


def remove_torn() -> None:
    """Remove what compilers were writing when they were asked to end, once none of them can write it any more."""
    for process, written in _torn.items():
        if _output(process) == written:  # it lives, and is no later process with the same number
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        with suppress(OSError):
            written.unlink()
    _torn.clear()


def _descendants(task: Path) -> list[int]:
    try:
        children = [int(word) for word in (task / "children").read_text().split()]
    except OSError:
        return []
    found = list(children)
    for child in children:
        with suppress(OSError):
            for inner in Path(f"/proc/{child}/task").iterdir():
                found += _descendants(inner)
    return found


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_torn.clear)  # the compilers belong to the parent
