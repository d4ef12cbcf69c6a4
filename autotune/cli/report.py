"""`report`: show a stored report again."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..errors import MeasurementError, PlanError, WorkloadError
from ..report import Report, read
from .arguments import BESIDE, OF_A_NAME
from .screen import screen


def report(args: Namespace) -> int:
    """Show a report.json, or the report in a plan.json, on the terminal, as Markdown or as an HTML page."""
    found = load(args.file)
    if args.html is None and not args.markdown:
        found.to_terminal(screen())
    if args.markdown:
        sys.stdout.write(found.to_markdown())
    if args.html is not None:
        out = args.file.with_suffix(".html") if args.html == BESIDE else args.html
        text = page(found, args.file)
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            kind = WorkloadError if error.errno in OF_A_NAME else MeasurementError
            raise kind(f"--html {out} cannot be written: {error.strerror}") from error
        if not args.markdown:
            screen().print(f"Written to {out}", soft_wrap=True)
    return 0


def load(file: Path) -> Report:
    """Load the report in a file.

    Raises:
        PlanError: the file cannot be read, is not JSON, or contains no report that can be shown.
    """
    try:
        data: Any = json.loads(file.read_bytes())
    except OSError as error:
        raise PlanError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{file} is not JSON: {error}; expected a report.json or plan.json of autotune") from error
    if isinstance(data, dict) and "fingerprint" in data:
        data = data.get("summary")
    if not isinstance(data, dict) or "verdict" not in data:
        raise PlanError(f"{file} holds no report; expected a report.json, or a plan.json with its summary")
    try:
        return read(data)
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from error


def page(found: Report, file: Path) -> str:
    """Draw a report as an HTML page. Raises PlanError for a malformed one, since the file may come from anywhere."""
    try:
        return found.to_html()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise PlanError(f"{file}: the report in it cannot be drawn ({type(error).__name__}: {error})") from error
