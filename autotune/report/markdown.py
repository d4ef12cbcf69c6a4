"""Render a record as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .layout import Section, Table
from .printable import printable
from .sections import headline, sections

MARKUP = re.compile(r"[\\|*`]|(?<!\w)_|_(?!\w)|<(?=[\w/!])")


def render(record: Mapping[str, Any]) -> str:
    """Return the whole report as one document."""
    return document(headline(record), sections(record))


def document(title: str, sections: Iterable[Section]) -> str:
    """Return sections under a title as one document."""
    parts = [f"# {escape(title)}", *(_section(s) for s in sections)]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    parts = [f"## {printable(section.title)}", *(escape(s) for s in section.sentences)]
    if section.table is not None:
        parts.append(_table(section.table))
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    rows = [
        _row(map(printable, table.columns)),
        _row("---:" if side == "r" else "---" for side in table.align),
        *(_row(escape(cell) for cell in row) for row in table.rows),
    ]
    if table.total:
        rows[-1] = _row(f"**{escape(cell)}**" if cell else "" for cell in table.rows[-1])
    return "\n".join(rows)


def _row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def escape(text: str) -> str:
    """Escape characters that Markdown takes for markup or for the end of a cell; names_like_this need no escape."""
    return " ".join(MARKUP.sub(r"\\\g<0>", printable(text)).split())
