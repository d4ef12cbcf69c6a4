"""A check's result, for machines and people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...tune import codec
from . import render
from .values import Checked, Metric

__all__ = ["CheckResult", "Metric"]

SCHEMA = 1


@dataclass(frozen=True)
class CheckResult(Checked):
    __doc__ = Checked.__doc__

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values. Numbers that are not finite become null."""
        head = {"schema": SCHEMA, "verdict": self.verdict.value, "exit_code": self.exit_code, "reason": self.reason}
        body: dict[str, Any] = codec.encode(self)
        return {**head, **body}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return codec.dumps(self.to_dict())

    def to_markdown(self) -> str:
        """Render a Markdown document for a pull request's comment or a job's summary."""
        return render.markdown(self)

    def to_junit(self) -> str:
        """Render JUnit XML for CI systems, with a test case for each metric."""
        return render.junit(self)
