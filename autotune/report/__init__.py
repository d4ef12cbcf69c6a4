"""Reports: what was measured, tried and decided, to be read.

    record (a dictionary fit for JSON) -> sections (what is worth saying) -> terminal, markdown, html

A record stands on its own: one read back from a plan or a report.json is shown exactly like a fresh one. This folder
knows nothing of who measured it.
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
        record: everything under stable names, in JSON's own types: times in ms, bytes, fractions; what was not measured
            is None.
    """

    record: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The record."""
        return dict(self.record)

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """A document in Markdown."""
        from .markdown import render

        return render(self.record)

    def to_html(self) -> str:
        """One self-contained page with charts: no script, nothing from a network.

        Raises:
            PackageError: matplotlib, which draws, is not installed.
        """
        from .html import render

        return render(self.record)

    def to_terminal(self, console: Console | None = None) -> None:
        """Draw with rich on `console`, by default standard output."""
        from .terminal import draw

        draw(self.record, console)

    def with_calls(self, served: int, bypassed: Mapping[str, int]) -> Self:
        """The same report, later.

        Args:
            served: calls served by the plan since.
            bypassed: calls that went to the original since, by reason.
        """
        return replace(self, record=dict(self.record) | {"served": served, "bypassed": dict(bypassed)})

    def without_original(self, weights_bytes: int | None) -> Self:
        """The same report, after the original was let go.

        Args:
            weights_bytes: what the weights take since.
        """
        return replace(self, record=dict(self.record) | {"bytes_after_release": weights_bytes})

    def __str__(self) -> str:
        from .terminal import plain

        return plain(self.record)


def read(record: Mapping[str, Any]) -> Report:
    """A report from a record of unknown origin.

    Raises:
        PlanError: it is not a record that this version can show.
    """
    report = Report(record)
    try:
        str(report)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise PlanError(f"the report in it cannot be shown ({type(error).__name__}: {error})") from error
    return report
