"""The roofline: the FLOP/s that every part of a phase attains, beside the limits of this machine.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import atan2, degrees, log10
from typing import TYPE_CHECKING, Any

from .. import numbers as n
from .. import sections
from ..layout import Table
from . import drawing as d
from . import labels
from .elements import Chapter, Html, figure, fold, joined, section, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

PHASES = ("decode", "prefill")
STATES = {"before": ("flops", "moved_bytes", "before_ms"), "after": ("after_flops", "after_moved_bytes", "after_ms")}
NAMES = {"before": "original", "after": "tuned"}
PANEL = 310.0  # height per phase, in points
WHOLE = "whole phase"
ROUND = re.compile(r"\.0+(?= )")  # zeros after the decimal point of a round number
CLOSE = 0.12  # distance in decades within which two roofs share a label
CAPTION = (
    "Further right, more is computed for each byte; higher, more is computed in a second. The slanted roof is memory "
    "bandwidth, the flat ones are matmul peaks, all as measured on this machine. A part that touches a roof cannot be "
    "faster with the bytes and FLOPs it has; a tuned part may move fewer bytes, which takes it to the right."
)


@dataclass(frozen=True)
class Mark:
    """One part of a phase on the roofline.

    Args:
        group: group of the operator table.
        intensity: FLOPs per byte.
        flops_per_s: attained FLOP/s.
        ms: time per call or token.
    """

    group: str
    intensity: float
    flops_per_s: float
    ms: float

    def __str__(self) -> str:
        rate = n.scaled(self.flops_per_s, "FLOP/s")
        return f"{self.group}: {rate} at {n.significant(self.intensity)} FLOP per byte, {n.milliseconds(self.ms)} ms"


def marks(rows: Sequence[Mapping[str, Any]], state: str) -> list[Mark]:
    """Return every part that both computes and moves something, and the whole phase last.

    Records of earlier versions may have none.
    """
    flops, moved, ms = STATES[state]
    found = [_mark(row["group"], row.get(flops), row.get(moved), row.get(ms)) for row in rows]
    sums = (sum(row.get(key) or 0.0 for row in rows) for key in (flops, moved, ms))
    return [mark for mark in (*found, _mark(WHOLE, *sums)) if mark is not None]


def _mark(group: str, flops: float | None, moved: float | None, ms: float | None) -> Mark | None:
    if not flops or not moved or not ms:
        return None
    return Mark(group, flops / moved, 1e3 * flops / ms, ms)


def chapter(record: Mapping[str, Any]) -> Chapter:
    """Show what limits each phase, in sentences, in a chart and in a table."""
    body = [section(sections.diagnosis(record))]
    found = {phase: _states(record, phase) for phase in PHASES if record["operators"].get(phase)}
    found = {phase: states for phase, states in found.items() if states}
    if found:
        drawing = d.chart(
            lambda sheet, narrow: _draw(sheet, found, record["hardware"]),
            _described(found),
            height=PANEL * len(found),
        )
        keys = {state: NAMES[state] for state in STATES if any(state in states for states in found.values())}
        tables = fold("The same as a table", _table(found))
        body.append(figure(drawing, CAPTION, tables, keys=keys | {"whole": WHOLE}))
    return Chapter("limits", "What limits it", joined(body))


def _states(record: Mapping[str, Any], phase: str) -> dict[str, list[Mark]]:
    """Map states to marks; "after" exists only if the model was changed."""
    states = ("before", "after") if record["transforms"] else ("before",)
    found = {state: marks(record["operators"][phase], state) for state in states}
    return {state: marks for state, marks in found.items() if marks}


def _described(found: Mapping[str, Mapping[str, Iterable[Mark]]]) -> str:
    parts = [
        f"{phase}, {NAMES[state]}: {'; '.join(map(str, marks))}"
        for phase, states in found.items()
        for state, marks in states.items()
    ]
    return f"Roofline. {'. '.join(parts)}."


def _table(found: Mapping[str, Mapping[str, Iterable[Mark]]]) -> Html:
    rows = tuple(
        (
            phase,
            mark.group,
            NAMES[state],
            n.milliseconds(mark.ms),
            n.significant(mark.intensity),
            n.scaled(mark.flops_per_s, "FLOP/s"),
            n.scaled(mark.flops_per_s / mark.intensity, "B/s"),
        )
        for phase, states in found.items()
        for state, marks in states.items()
        for mark in marks
    )
    columns = ("phase", "part", "", "ms", "FLOP per byte", "attained", "moved")
    return table(Table(columns, "lllrrrr", rows), "Roofline of every part")


def _draw(sheet: Figure, found: Mapping[str, Mapping[str, Sequence[Mark]]], hardware: Mapping[str, Any]) -> None:
    panels: list[Axes] = list(sheet.subplots(len(found), 1, squeeze=False).flat)
    for axes, (phase, states) in zip(panels, found.items(), strict=True):
        _frame(axes, phase, [mark for marks in states.values() for mark in marks], hardware)
        for state, marks in states.items():
            for mark in marks:
                _dot(axes, mark, state, whole=mark.group == WHOLE)
        _arrows(axes, states)
    panels[-1].set_xlabel("FLOP per byte")
    sheet.draw_without_rendering()
    sheet.set_layout_engine("none")
    for axes, states in zip(panels, found.values(), strict=True):
        lines, texts = _cover(axes, hardware)
        last = {mark.group: mark for state in STATES for mark in states.get(state, ())}
        names = [(m.intensity, m.flops_per_s, m.group) for m in last.values() if m.group != WHOLE]
        dots = [(m.intensity, m.flops_per_s) for marks in states.values() for m in marks]
        labels.write(axes, names, avoid=[*dots, *lines], clear_of=texts)


def _frame(axes: Axes, phase: str, found: Sequence[Mark], hardware: Mapping[str, Any]) -> None:
    """Set up logarithmic axes that contain every mark and the ridges."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    bandwidth, peaks = hardware["bandwidth_bytes_per_s"], _peaks(hardware)
    ridges = [peak / bandwidth for peak in peaks.values()] if n.known(bandwidth) and bandwidth > 0 else []
    x = [m.intensity for m in found] + ridges
    y = [m.flops_per_s for m in found] + list(peaks.values())
    axes.set(title=f"{phase}, attained", xscale="log", yscale="log")
    axes.set(xlim=(min(x) / 3, max(x) * 5), ylim=(min(y) / 3, max(y) * 3))
    axes.xaxis.set_major_locator(LogLocator(10, numticks=8))
    axes.yaxis.set_major_locator(LogLocator(10, numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: n.significant(value, 1)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: ROUND.sub("", n.scaled(value, "FLOP/s"))))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(True)


def _peaks(hardware: Mapping[str, Any]) -> dict[str, float]:
    return {name: rate for name, rate in hardware["flops_per_s"].items() if n.known(rate) and rate > 0}


def _cover(axes: Axes, hardware: Mapping[str, Any]) -> tuple[list[tuple[float, float]], list[Text]]:
    """Draw the roofs; the layout must be final. Return points along them and their labels, to keep both uncovered."""
    peaks, bandwidth = _peaks(hardware), hardware["bandwidth_bytes_per_s"]
    if not n.known(bandwidth) or bandwidth <= 0:
        return [], []
    (x_low, x_high), (_, y_high) = axes.get_xlim(), axes.get_ylim()
    roofs = [(n.scaled(bandwidth, "B/s"), _line(x_low, max(peaks.values(), default=y_high) / bandwidth, bandwidth))]
    roofs += [(name, [(x, rate) for x in _spread(rate / bandwidth, x_high)]) for name, rate in _roofs(peaks)]
    texts: list[Text] = []
    to_pixels = axes.transData.transform
    for name, points in roofs:
        (left, below), (right, above) = to_pixels([points[0], points[-1]])
        angle = degrees(atan2(above - below, right - left))
        axes.plot(*zip(*points, strict=True), color=d.MUTED, linewidth=1.4, zorder=1)
        text = axes.annotate(
            name,
            points[1] if angle else points[-1],
            xytext=(0, 4),
            textcoords="offset points",
            ha="left" if angle else "right",
            rotation=angle,
            rotation_mode="anchor",
            bbox={"facecolor": d.PANEL, "edgecolor": "none", "pad": 0.5},
            zorder=1.5,
            color=d.MUTED,
            fontsize=d.TEXT - 1.5,
        )
        texts.append(text)
    return [point for _, points in roofs for point in points], texts


def _line(low: float, high: float, slope: float) -> list[tuple[float, float]]:
    return [(x, slope * x) for x in _spread(low, high)]


def _spread(low: float, high: float, count: int = 24) -> list[float]:
    """Return `count` values from low to high, evenly spaced on a logarithmic axis."""
    return [low * (high / low) ** (k / (count - 1)) for k in range(count)]


def _roofs(peaks: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return label and FLOP/s of each roof, the lowest first.

    Roofs that are within `CLOSE` of each other become one: the highest, labelled with all their names.
    """
    found = list[tuple[str, float]]()
    for name, rate in sorted(peaks.items(), key=lambda item: item[1]):
        text = f"{name} {n.scaled(rate, 'FLOP/s')}"
        if found and log10(rate / found[-1][1]) < CLOSE:
            below = found.pop()[0].removesuffix(" FLOP/s").removesuffix("FLOP/s")
            text = f"{below.rsplit(' ', 2)[0]}, {text}"
        found.append((text, rate))
    return found


def _dot(axes: Axes, mark: Mark, state: str, *, whole: bool) -> None:
    colour = d.AFTER if state == "after" else d.BEFORE
    (line,) = axes.plot(
        mark.intensity,
        mark.flops_per_s,
        "D" if whole else "o",
        markersize=8.5 if whole else 7,
        markerfacecolor=d.PANEL if whole else colour,
        markeredgecolor=colour,
        markeredgewidth=2 if whole else 1,
        zorder=4,
    )
    d.tip(line, f"{mark} ({NAMES[state]})")


def _arrows(axes: Axes, states: Mapping[str, Sequence[Mark]]) -> None:
    """Draw an arrow from each part before tuning to the same part after it."""
    later = {mark.group: mark for mark in states.get("after", ())}
    for was in states.get("before", ()):
        if (now := later.get(was.group)) is not None:
            axes.annotate(
                "",
                (now.intensity, now.flops_per_s),
                (was.intensity, was.flops_per_s),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": d.BEFORE,
                    "linewidth": 0.9,
                    "shrinkA": 5,
                    "shrinkB": 5,
                    "mutation_scale": 7,
                },
                zorder=2,
            )
