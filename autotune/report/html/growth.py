"""Show how decode grows: tokens per second by batch size, time per token by context length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import numbers as n
from .. import sections
from . import drawing as d
from .elements import Chapter, Html, figure, fold, joined, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """A curve of one column of the record over another.

    Args:
        key: key of the record.
        title: title of the table in the report's other forms.
        axis: the column on the horizontal axis.
        value: the column on the vertical axis; after tuning, it has the prefix "after_".
        unit: unit of the value.
    """

    key: str
    title: str
    axis: str
    value: str
    unit: str

    def points(self, record: Mapping[str, Any], state: str) -> list[tuple[int, float]]:
        name = self.value if state == "before" else f"after_{self.value}"
        return [(point[self.axis], point[name]) for point in record[self.key] if n.known(point[name])]


CURVES = (
    Curve("batch_scaling", "Decode by batch size", "batch", "tokens_per_s", "tokens per second"),
    Curve("context_growth", "Decode by context length", "context", "ms_per_step", "ms per token"),
)


def chapter(record: Mapping[str, Any]) -> Chapter | None:
    """Show the curves that were measured; None if there are none."""
    curves = [curve for curve in CURVES if record[curve.key]]
    if not curves:
        return None
    states = ("before", "after") if record["transforms"] else ("before",)
    drawing = d.chart(
        lambda sheet, narrow: _draw(sheet, narrow, curves, states, record),
        " ".join(_described(curve, states, record) for curve in curves),
        height=260,
        narrow_height=230 * len(curves),
    )
    keys = {"before": "original", "after": "tuned"} if len(states) > 1 else None
    caption = "Decoding at growing batch sizes and contexts, as far as the time for measuring it reached."
    return Chapter("growth", "Batch and context", figure(drawing, caption, _tables(curves, record), keys=keys))


def _tables(curves: Sequence[Curve], record: Mapping[str, Any]) -> Html:
    found = (sections.growth(record, curve.key, curve.title, curve.axis) for curve in curves)
    return fold("The same as tables", joined(map(titled, found)))


def _described(curve: Curve, states: Sequence[str], record: Mapping[str, Any]) -> str:
    names = {"before": "original", "after": "tuned"}
    parts = [
        f"{names[state]}: {', '.join(f'{n.significant(y)} at {x}' for x, y in points)}"
        for state in states
        if (points := curve.points(record, state))
    ]
    return f"{curve.title}, {curve.unit}. {'; '.join(parts)}."


def _draw(
    sheet: Figure, narrow: bool, curves: Sequence[Curve], states: Sequence[str], record: Mapping[str, Any]
) -> None:
    grid = (len(curves), 1) if narrow else (1, len(curves))
    for axes, curve in zip(sheet.subplots(*grid, squeeze=False).flat, curves, strict=True):
        ends = {state: points[-1][1] for state in states if (points := curve.points(record, state))}
        for state in ends:
            _line(axes, curve.points(record, state), state, curve, below=ends[state] < max(ends.values()))
        at = sorted({x for state in states for x, _ in curve.points(record, state)})
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [str(x) for x in at])
        axes.set_xticks([], minor=True)
        axes.set_xlim(at[0] / 1.25, at[-1] * 1.4)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
        axes.set_xlabel(f"{curve.axis} {'size' if curve.axis == 'batch' else 'length'}")
        axes.set_title(curve.unit)
        axes.grid(True, axis="y")


def _line(axes: Axes, points: Sequence[tuple[int, float]], state: str, curve: Curve, *, below: bool) -> None:
    """Draw a curve, and write its last value above or below its end."""
    colour = d.AFTER if state == "after" else d.BEFORE
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8)
    for x, y in points:
        (dot,) = axes.plot(x, y, "o", color=colour, markersize=6)
        d.tip(dot, f"{curve.axis} {x}: {n.significant(y)} {curve.unit}")
    axes.annotate(
        n.significant(points[-1][1]),
        points[-1],
        xytext=(0, -16 if below else 7),
        textcoords="offset points",
        ha="center",
        fontsize=d.TEXT - 1,
        weight="bold",
    )
