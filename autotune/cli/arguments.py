"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

MOST_THREADS = 1024  # more than any machine has: OpenMP ends the process where it cannot start them
BESIDE = Path()  # stands for a file beside the one that is read


def threads(text: str) -> int:
    """A number of threads."""
    if not text.isdecimal() or len(text) > len(str(MOST_THREADS)) or not 1 <= int(text) <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 to {MOST_THREADS}")
    return int(text)
