"""Make text from files safe for a terminal."""

from __future__ import annotations

import re

# Characters that a terminal obeys: control characters (C0 except tab and newline, DEL, C1), and those that reorder a
# line (https://trojansource.codes). Also surrogates, which cannot be encoded.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Replace the characters that a terminal would obey instead of showing them.

    Names of models, arms, tasks and policies, answers of models and messages about files are not trusted.
    """
    return OBEYED.sub("\ufffd", str(text))
