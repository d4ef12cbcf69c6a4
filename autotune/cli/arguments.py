"""Parts that the commands' arguments share."""

from __future__ import annotations

import argparse
import errno
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..tune.plan import Plan

MOST_THREADS = 1024  # largest number accepted; OpenMP ends the process if it cannot start its threads
BESIDE = Path()  # means a file beside the one that is read
OF_A_NAME = (  # errors of a path that the user gave; they count as usage errors
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


def threads(text: str) -> int:
    """Parse a number of threads."""
    return whole(text, 1, MOST_THREADS, f"a whole number of 1 to {MOST_THREADS}")


def whole(text: str, least: int, most: int, what: str) -> int:
    """Parse a whole number within bounds; `what` says in an error what was expected."""
    if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return int(text)


def number(text: str, fits: Callable[[float], bool], what: str) -> float:
    """Parse a number that fits; `what` says in an error what was expected."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan  # fits nowhere
    if not fits(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return found


def plan_of(file: Path | None) -> Plan | None:
    """Read a plan.json; None for None.

    Raises:
        PlanError: the file cannot be read, or is no plan.
    """
    from ..tune.plan import Plan

    return None if file is None else Plan.load(file)
