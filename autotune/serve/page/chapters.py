"""The report's chapters that the page shows, as markup that a strict content security policy admits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import PackageError
from ...report import candidates, sections
from ...report.html import roofline, trials
from ...report.html.elements import Chapter, Html, cleaned, element, joined, section, titled

STYLED = ' style="'
KEPT = ' data-style="'  # the page's script sets it: the policy forbids styles in markup


def chapters(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return each chapter as its id, its title and its HTML, with styles as `data-style`.

    Args:
        record: of a report.
    """
    shown = cleaned(record)
    try:
        found = [roofline.chapter(shown), trials.chapter(shown)]
    except PackageError as error:
        found = _undrawn(shown, str(error))
    return [
        {"id": chapter.id, "title": chapter.title, "html": chapter.body.replace(STYLED, KEPT)}
        for chapter in found
        if chapter is not None
    ]


def _undrawn(record: Mapping[str, Any], reason: str) -> list[Chapter | None]:
    """Return the same chapters in sentences and tables, where no chart can be drawn."""
    note = element("p", reason, class_="muted")
    limits = Chapter("limits", "What limits it", joined((section(sections.diagnosis(record)), note)))
    listed: Html = joined(titled(found) for found in (candidates.tried(record), candidates.not_tried(record)))
    return [limits, Chapter("trials", "What was tried", listed) if listed else None]
