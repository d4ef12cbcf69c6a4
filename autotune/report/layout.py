"""The elements of a report: sections of sentences, and tables of text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of cells that are ready to be drawn.

    Args:
        columns: headings.
        align: one letter per column, "l" or "r".
        rows: cells.
        total: whether the last row sums up the others.
    """

    columns: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    total: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, sentences, and a table or None."""

    title: str
    sentences: tuple[str, ...] = ()
    table: Table | None = None


def sentence(text: str) -> str:
    """Return `text` with a capital letter and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""
