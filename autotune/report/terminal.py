"""Show a record on a terminal, or as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from .layout import Section, Table
from .printable import printable
from .sections import headline, sections

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as Drawing

PLAIN_WIDTH = 120  # characters a line
UNBROKEN = 48  # longest candidate name, in characters, that is not wrapped; a longer one leaves no room for the reason
STYLES = {
    "accepted": "green",
    "rejected": "red",
    "error": "red",
    "blocked": "red",
    "inconclusive": "yellow",
    "unreached": "yellow",
    "pass": "green",
    "fail": "red",
}


def draw(record: Mapping[str, Any], console: Console | None = None) -> None:
    """Draw the whole report."""
    show(headline(record), sections(record), console)


def show(title: str, sections: Iterable[Section], console: Console | None = None) -> None:
    """Draw sections under a title, by default on standard output."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print()
    console.print(Text(printable(title), style="bold"))
    for section in sections:
        console.print()
        console.print(Text(printable(section.title), style="bold cyan"))
        for sentence in section.sentences:
            console.print(Text(printable(sentence)))
        if section.table is not None:
            console.print(drawn(section.table))
    console.print()


def plain(record: Mapping[str, Any]) -> str:
    """Return the whole report as text without colours."""
    return text(headline(record), sections(record))


def text(title: str, sections: Iterable[Section]) -> str:
    """Return sections under a title as text without colours."""
    from rich.console import Console

    out = io.StringIO()
    show(title, sections, Console(file=out, width=PLAIN_WIDTH, no_color=True, force_terminal=False, highlight=False))
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines()) + "\n"


def drawn(table: Table) -> Drawing:
    """Make a rich table. Cells are text, never markup."""
    from rich import box
    from rich.table import Table as Drawing
    from rich.text import Text

    drawing = Drawing(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=False, header_style="dim")
    for index, (name, side) in enumerate(zip(table.columns, table.align, strict=True)):
        justify: Literal["left", "right"] = "right" if side == "r" else "left"
        short = all(len(row[index]) <= UNBROKEN for row in table.rows)
        drawing.add_column(printable(name), justify=justify, overflow="fold", no_wrap=name == "candidate" and short)
    for index, row in enumerate(table.rows):
        last = table.total and index == len(table.rows) - 1
        if last:
            drawing.add_section()
        cells = (Text(printable(cell), style=STYLES.get(cell.split(":")[0], "")) for cell in row)
        drawing.add_row(*cells, style="bold" if last else None)
    return drawing
