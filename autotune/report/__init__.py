"""Reports of what was measured, tried and decided.

    record (a dictionary fit for JSON) -> sections (what is worth saying) -> terminal, markdown, html

A record is complete: one read back from a plan or a report.json is shown exactly like a new one. This folder does not
depend on the code that measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from ..errors import PlanError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Report:
    """A record that can be shown.

    Args:
        record: all values under stable names, in JSON's types: times in ms, bytes, fractions; None if not measured.
    """

    record: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a new dictionary."""
        return dict(self.record)

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Return the report as a Markdown document."""
        from .markdown import render

        return render(self.record)

    def to_html(self) -> str:
        """Return the report as one self-contained HTML page with charts, without scripts or network access.

        Raises:
            PackageError: matplotlib, which draws the charts, is not installed.
        """
        from .html import render

        return render(self.record)

    def to_terminal(self, console: Console | None = None) -> None:
        """Draw with rich on `console`, by default standard output."""
        from .terminal import draw

        draw(self.record, console)

    def with_calls(self, served: int, bypassed: Mapping[str, int]) -> Self:
        """Return the same report with the numbers of calls since tuning.

        Args:
            served: calls served by the plan since.
            bypassed: calls that went to the original since, by reason.
        """
        return replace(self, record=dict(self.record) | {"served": served, "bypassed": dict(bypassed)})

    def without_original(self, weights_bytes: int | None) -> Self:
        """Return the same report for a model whose original was released.

        Args:
            weights_bytes: bytes that the weights take since then.
        """
        return replace(self, record=dict(self.record) | {"bytes_after_release": weights_bytes})

    def __str__(self) -> str:
        from .terminal import plain

        return plain(self.record)


def read(record: Mapping[str, Any]) -> Report:
    """Make a report from a record of unknown origin.

    Raises:
        PlanError: this version cannot show the record.
    """
    report = Report(record)
    try:
        str(report)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise PlanError(f"the report in it cannot be shown ({type(error).__name__}: {error})") from error
    return report
