"""What a report is made of: sections of sentences and a table of text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells ready to be drawn.

    Args:
        columns: headings.
        align: one letter a column, "l" or "r".
        rows: cells.
        total: whether the last row sums up the others.
    """

    columns: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    total: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, sentences, and a table where there is something to tabulate."""

    title: str
    sentences: tuple[str, ...] = ()
    table: Table | None = None


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""
