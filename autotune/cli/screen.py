"""Standard output, drawn on by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 120  # of what goes into a file or a pipe


def screen() -> Console:
    """Text as it is given: nothing in it is taken for markup or highlighted."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=PLAIN_WIDTH)
