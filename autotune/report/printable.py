"""Text that comes from files, fit for a terminal."""

from __future__ import annotations

import re

# Control characters (C0 but tab and newline, DEL, C1), halves of characters that cannot be encoded, and those that
# reorder a line: a terminal obeys them. https://trojansource.codes
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Text in which whatever a terminal would obey rather than show is a replacement character.

    Names of models, arms, tasks and policies, answers of models and messages about files come from strangers.
    """
    return OBEYED.sub("\ufffd", str(text))
