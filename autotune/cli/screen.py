"""A rich console on standard output."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from ..report.printable import printable

PLAIN_WIDTH = 120  # columns of output to a file or a pipe


class Screen(Console):
    """A console that prints text as it is, without markup, highlighting or terminal control sequences."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(highlight=False, markup=False, width=width)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def screen() -> Console:
    """Make a console on standard output, as wide as the terminal."""
    console = Screen()
    return console if console.is_terminal else Screen(PLAIN_WIDTH)
