"""An experiment's result, and the ways to show it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ExperimentError, PlanError
from ...report.markdown import document
from ...report.terminal import show, text
from ...tune import codec
from .chart import draw
from .outcomes import Cell, Outcome, Outcomes
from .pareto import Point, front, plotted, points
from .sections import headline, sections

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Cell", "Outcome", "Result", "read"]


@dataclass(frozen=True)
class Result(Outcomes):
    __doc__ = Outcomes.__doc__

    def pareto(self) -> tuple[Point, ...]:
        """The arms that no other arm beats in speed, quality and memory together, the fastest first."""
        return front(points(self))

    def chart(self, path: str | Path) -> Path:
        """Draw speed against quality into an .svg, .png or .pdf file.

        Raises:
            PackageError: matplotlib is not installed.
            ExperimentError: the file has another ending, or cannot be written.
        """
        return draw(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Convert everything to JSON values; figures that were not measured are None."""
        encoded: dict[str, Any] = codec.encode(self)
        return encoded

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Render a Markdown document."""
        return document(headline(self), sections(self))

    def to_terminal(self, console: Console | None = None) -> None:
        """Draw with rich on `console`, by default standard output."""
        from rich.console import Console

        console = console or Console()
        show(headline(self), sections(self), console)
        console.print(plotted(points(self)), highlight=False, markup=False)

    def __str__(self) -> str:
        return text(headline(self), sections(self)) + "\n" + plotted(points(self))


def read(record: Mapping[str, Any]) -> Result:
    """Read a result from the output of `Result.to_dict`.

    Raises:
        ExperimentError: the record is not a result, or is of another version of autotune.
    """
    try:
        result: Result = codec.decode(Result, dict(record), "result")
    except PlanError as error:
        raise ExperimentError(f"the kept result cannot be read ({error}); run the experiment again") from error
    return result
