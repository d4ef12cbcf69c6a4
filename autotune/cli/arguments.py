"""Parts that the commands' arguments share."""

from __future__ import annotations

import argparse
from pathlib import Path

MOST_THREADS = 1024  # largest number accepted; OpenMP ends the process if it cannot start its threads
BESIDE = Path()  # means a file beside the one that is read


def threads(text: str) -> int:
    """Parse a number of threads."""
    if not text.isdecimal() or len(text) > len(str(MOST_THREADS)) or not 1 <= int(text) <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 to {MOST_THREADS}")
    return int(text)
