"""Show the time of each phase by operator, before and after tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import numbers as n
from .. import sections
from . import drawing as d
from .elements import Chapter, figure, fold, joined, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW, FRAME = 36.0, 40.0  # height of a row, and of the space around all rows, in points
TUNED = (("before_ms", d.BEFORE, -0.17), ("after_ms", d.AFTER, 0.17))  # figure, colour, vertical offset in rows
AS_IT_IS = (("before_ms", d.AFTER, 0.0),)
TITLE = {"decode": "decode, ms per token", "prefill": "prefill, ms to the first token"}


def chapter(record: Mapping[str, Any]) -> Chapter | None:
    """Show the operator tables; None if nothing was traced."""
    found = {
        phase: sorted(rows, key=lambda row: -row["before_ms"])
        for phase in TITLE
        if (rows := record["operators"].get(phase))
    }
    if not found:
        return None
    tuned, rows = bool(record["transforms"]), [len(rows) for rows in found.values()]
    drawing = d.chart(
        lambda sheet, narrow: _draw(sheet, narrow, found, tuned),
        _described(found, tuned),
        height=ROW * max(rows) + FRAME,
        narrow_height=ROW * sum(rows) + FRAME * len(rows),
    )
    parts = map(titled, sections.operators(record))
    keys = {"before": "original", "after": "tuned"} if tuned else None
    shown = figure(drawing, "Milliseconds by part.", fold("The same as tables", joined(parts)), keys=keys)
    return Chapter("operators", "Where the time goes", shown)


def _described(found: Mapping[str, Sequence[Mapping[str, Any]]], tuned: bool) -> str:
    def said(row: Mapping[str, Any]) -> str:
        after = f" before, {n.milliseconds(row['after_ms'])} after" if tuned else ""
        return f"{row['group']} {n.milliseconds(row['before_ms'])}{after}"

    return " ".join(f"{TITLE[phase]}: {'; '.join(map(said, rows))}." for phase, rows in found.items())


def _draw(sheet: Figure, narrow: bool, found: Mapping[str, Sequence[Mapping[str, Any]]], tuned: bool) -> None:
    tallest = max(map(len, found.values()))
    for axes, (phase, rows) in zip(d.panels(sheet, found.values(), narrow), found.items(), strict=True):
        states = TUNED if tuned else AS_IT_IS
        longest = max(max(row["before_ms"], row["after_ms"]) for row in rows) or 1.0
        for place, row in enumerate(rows):
            for key, colour, offset in states:
                bar = axes.barh(place + offset, row[key], height=0.3 if tuned else 0.5, color=colour)[0]
                d.tip(bar, f"{row['group']}: {n.milliseconds(row[key])} ms")
                text, end = n.milliseconds(row[key]), row[key] + 0.012 * longest
                axes.text(end, place + offset, text, va="center", fontsize=d.TEXT - 1.5, color=d.MUTED)
        axes.set_xlim(0, 1.18 * longest)
        axes.set_ylim((len(rows) if narrow else tallest) - 0.45, -0.55)
        axes.set_yticks(range(len(rows)), [row["group"] for row in rows])
        axes.set_title(TITLE[phase])
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
