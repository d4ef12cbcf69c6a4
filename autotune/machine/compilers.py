"""The C++ compiler of this machine."""

from __future__ import annotations

import os
import shlex
import shutil

NAMES = ("c++", "g++", "clang++")


def command() -> list[str] | None:
    """The command: $CXX split into words if it is set, else the first usual name.

    None if it is not on the path, or $CXX has a quotation without end.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError:
        return None
    candidates = [named] if named else [[name] for name in NAMES]
    return next((words for words in candidates if shutil.which(words[0])), None)


def path() -> str | None:
    """Path of that compiler, or None."""
    found = command()
    return shutil.which(found[0]) if found else None
