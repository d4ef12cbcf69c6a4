"""The waterfall chart: from the original's time to the plan's, one accepted step after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...workload import METRIC_OF, Phase
from .. import numbers as n
from ..layout import Table
from . import drawing as d
from .elements import Chapter, figure, fold, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE: Mapping[Phase, str] = {"decode": "ms per token (decode)", "prefill": "ms to the first token (prefill)"}
ROW, FRAME = 42.0, 46.0  # height of a step, and of the space around all steps, in points
NAME_WIDTH = {False: 54, True: 50}  # most characters of a name, by whether the chart is narrow
CAPTION = (
    "Each step was timed upon those before it; the last bar is the whole plan, timed against the original on prompts "
    "it was not chosen on. What a step took away is left as an outline."
)


@dataclass(frozen=True)
class Bar:
    """A bar: the phase's time before and after a step, in ms. Both are equal for the first and the last bar."""

    name: str
    before_ms: float
    after_ms: float

    @property
    def gain(self) -> str:
        return n.ratio(self.before_ms / self.after_ms) if self.before_ms != self.after_ms else ""


def steps(record: Mapping[str, Any], phase: Phase) -> list[Bar]:
    """Return the original, the steps accepted for a phase in their order, and the plan as confirmed."""
    figures, metric = record["phases"][phase], METRIC_OF[phase]
    now = figures["baseline_ms"]
    found = [Bar("original", now, now)]
    for trial in record["trials"]:
        gain = _gain(trial, phase, metric)
        if trial["outcome"] == "accepted" and trial["phase"] in (phase, "both") and gain:
            found.append(Bar(trial["candidate"], now, now / gain))
            now /= gain
    return [*found, Bar("the whole plan", figures["final_ms"], figures["final_ms"])]


def _gain(trial: Mapping[str, Any], phase: str, metric: str) -> float | None:
    """Return the phase's speed-up; None if unknown. Records of earlier versions have only that of the target phase."""
    if measured := trial.get(metric):
        ratio: float | None = measured["ratio"]
        return ratio
    return trial["speedup"] if trial["target"] == phase else None


def chapter(record: Mapping[str, Any]) -> Chapter | None:
    """Show the plan's steps in a chart and a table; None if there is no plan."""
    if not record["transforms"]:
        return None
    found = {phase: steps(record, phase) for phase in TITLE if phase in record["phases"]}
    rows = [len(steps) for steps in found.values()]
    drawing = d.chart(
        lambda sheet, narrow: _draw(sheet, narrow, found),
        _described(found),
        height=ROW * max(rows) + FRAME,
        narrow_height=ROW * sum(rows) + FRAME * len(rows),
    )
    cells = tuple(
        (phase, step.name, n.milliseconds(step.after_ms), step.gain) for phase in found for step in found[phase]
    )
    listed = table(Table(("phase", "step", "ms", "speed-up"), "llrr", cells), "Accepted steps")
    return Chapter("steps", "Step by step", figure(drawing, CAPTION, fold("The same as a table", listed)))


def _described(found: Mapping[Phase, Sequence[Bar]]) -> str:
    return " ".join(
        f"{TITLE[phase]}: {'; '.join(f'{step.name} {n.milliseconds(step.after_ms)}' for step in steps)}."
        for phase, steps in found.items()
    )


def _draw(sheet: Figure, narrow: bool, found: Mapping[Phase, Sequence[Bar]]) -> None:
    tallest = max(map(len, found.values()))
    for axes, (phase, steps) in zip(d.panels(sheet, found.values(), narrow), found.items(), strict=True):
        _bars(axes, steps, NAME_WIDTH[narrow])
        axes.set_title(TITLE[phase])
        axes.set_ylim((len(steps) if narrow else tallest) - 0.4, -0.75)


def _bars(axes: Axes, steps: Sequence[Bar], width: int) -> None:
    longest = max(max(step.before_ms, step.after_ms) for step in steps)
    for place, step in enumerate(steps):
        first, last = place == 0, place == len(steps) - 1
        colour = d.BEFORE if first else d.AFTER
        bar = axes.barh(place, step.after_ms, height=0.4, color=colour, alpha=1.0 if first or last else 0.6)[0]
        d.tip(bar, f"{step.name}: {n.milliseconds(step.after_ms)} ms {step.gain}")
        if step.before_ms > step.after_ms:
            saved = step.before_ms - step.after_ms
            axes.barh(place, saved, 0.4, step.after_ms, facecolor="none", edgecolor=d.LINE, linewidth=1)
        name = step.name if len(step.name) <= width else f"{step.name[: width - 3]}..."
        axes.text(0, place - 0.27, name, va="bottom", fontsize=d.TEXT - 1)
        figures = n.milliseconds(step.after_ms) + (f" ({step.gain})" if step.gain else "")
        end = max(step.before_ms, step.after_ms) + 0.015 * longest
        axes.text(end, place, figures, va="center", fontsize=d.TEXT - 0.5, weight="bold")
    axes.set_xlim(0, longest * 1.32)
    axes.set_yticks([])
    axes.set_xticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
