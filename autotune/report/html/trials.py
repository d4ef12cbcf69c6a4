"""Show all candidates: a table that can be filtered without a script, and a chart of predicted against measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from .. import candidates
from .. import numbers as n
from ..layout import Table
from . import drawing as d
from . import labels
from .elements import Chapter, Html, badge, code, element, figure, joined, row, tabulated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Outcomes in the order of the filters.
OUTCOMES = ("accepted", "rejected", "inconclusive", "error", "blocked", "unreached", "skipped", "unavailable")
WANTED = candidates.TRIED | candidates.UNTRIED
COLUMNS = ("candidate", "predicted", "measured", "KLD", "took", "outcome")
ALIGN = "lrrrrl"
NOTE = (
    "Predicted is the best the roofline allows; measured is against what was accepted before, so it may be off the "
    "prediction on both sides. KLD is the mean KL divergence from the original in nat."
)
MARKERS = {"accepted": "o", "rejected": "X", "error": "v", "inconclusive": "s"}


def chapter(record: Mapping[str, Any]) -> Chapter | None:
    """Show every trial; None if there are none."""
    if not record["trials"]:
        return None
    trials = sorted(record["trials"], key=lambda trial: trial["outcome"] not in WANTED)
    ran = [trial for trial in trials if trial["outcome"] in candidates.TRIED]
    wanted, accepted = sum(map(_is_wanted, trials)), sum(trial["outcome"] == "accepted" for trial in trials)
    told = f"{accepted} of {len(ran)} candidates tried were accepted; {len(trials) - wanted} were ruled out. {NOTE}"
    if failed := wanted - len(ran):
        told = f"{failed} of {wanted} candidates that were called for could not be tried. {told}"
    drawn = Table(COLUMNS, ALIGN, ())
    body = (
        row(_cells(trial), drawn, data_outcome=_known(trial["outcome"]), data_ran="yes" if _is_wanted(trial) else "no")
        for trial in trials
    )
    listed = tabulated(drawn, "Everything that was considered", body, stacked=True)
    filtered = element("div", _filters(trials, wanted), listed, class_="trials")
    return Chapter("trials", "What was tried", joined((element("p", told), _scatter(ran), filtered)))


def _cells(trial: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        code(trial["candidate"]),
        n.ratio(trial["predicted"]),
        n.ratio(trial["speedup"]),
        n.divergence(trial["quality"]["mean_kld"] if trial["quality"] else None),
        n.duration(trial["seconds"]) if _is_wanted(trial) else n.MISSING,
        joined((badge(trial["outcome"]), " ", trial["reason"])),
    )


def _known(outcome: str) -> str:
    return outcome if outcome in OUTCOMES else "other"


def _is_wanted(trial: Mapping[str, Any]) -> bool:
    return trial["outcome"] in WANTED


def _filters(trials: Sequence[Mapping[str, Any]], wanted: int) -> Html:
    """Return one choice for each outcome that occurs. The style sheet hides the rows of the other outcomes."""
    counts = {name: sum(trial["outcome"] == name for trial in trials) for name in OUTCOMES}
    choices = {"ran": wanted, **{name: count for name, count in counts.items() if count}, "all": len(trials)}
    chosen = "ran" if wanted else "all"
    buttons = (
        element(
            "label",
            element("input", type="radio", name="outcome", value=name, checked="" if name == chosen else None),
            element("span", f"{'called for' if name == 'ran' else name} {count}"),
        )
        for name, count in choices.items()
        if count
    )
    return element("fieldset", element("legend", "Show", class_="unseen"), *buttons, class_="filters")


def _scatter(ran: Sequence[Mapping[str, Any]]) -> Html | None:
    """Draw predicted against measured speed-ups of the trials that have both; None if there are none."""
    both = [trial for trial in ran if n.known(trial["predicted"]) and n.known(trial["speedup"])]
    both = [trial for trial in both if trial["predicted"] > 0 and trial["speedup"] > 0]
    if not both:
        return None
    share = median(trial["speedup"] / trial["predicted"] for trial in both)
    caption = (
        "Predicted against measured speed-up of what was timed. On the diagonal a candidate keeps its promise; in the "
        f"median it is {n.percent(share)} of it."
    )
    if others := len(ran) - len(both):
        caption += f" Not drawn: {others} that ran but were turned down before they were timed, or had no prediction."
    described = "; ".join(
        f"{trial['candidate']}: predicted {n.ratio(trial['predicted'])}, measured {n.ratio(trial['speedup'])}, "
        f"{trial['outcome']}"
        for trial in both
    )
    drawing = d.chart(
        lambda sheet, narrow: _draw(sheet, both),
        f"Predicted against measured. {described}.",
        height=340,
        narrow_height=330,
    )
    keys = {name: name for name in MARKERS if any(trial["outcome"] == name for trial in both)}
    return figure(drawing, caption, keys=keys)


def _draw(sheet: Figure, trials: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes = sheet.subplots()
    values = [trial[key] for trial in trials for key in ("predicted", "speedup")]
    low, high = min(0.9, *values) / 1.1, max(1.5, *values) * 1.25
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="predicted", ylabel="measured")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.grid(True)
    axes.plot([low, high], [low, high], color=d.MUTED, linewidth=1.2)
    axes.axhline(1, color=d.LINE, linewidth=1)
    for trial in trials:
        (line,) = axes.plot(
            trial["predicted"],
            trial["speedup"],
            MARKERS.get(trial["outcome"], "o"),
            color=d.TONES.get(trial["outcome"], d.MUTED),
            markersize=8,
        )
        d.tip(line, f"{trial['candidate']}: predicted {n.ratio(trial['predicted'])}, measured {_measured(trial)}")
    sheet.draw_without_rendering()
    sheet.set_layout_engine("none")
    diagonal = [(value, value) for value in (low * (high / low) ** (k / 20) for k in range(21))]
    names = [(trial["predicted"], trial["speedup"], trial["candidate"].partition("(")[0]) for trial in trials]
    labels.write(axes, names, avoid=diagonal)


def _measured(trial: Mapping[str, Any]) -> str:
    bounds = n.interval(trial["speedup_low"], trial["speedup_high"])
    return f"{n.ratio(trial['speedup'])} ({bounds}), {trial['outcome']}" if bounds else n.ratio(trial["speedup"])
