"""Latency: every pair's speed-up, and the raw times of both arms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from ...workload import by_bucket
from .. import numbers as n
from ..layout import Table, sentence
from . import drawing as d
from .elements import Chapter, badge, element, figure, fold, joined, paragraphs, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = {"end_to_end": "whole request", "tpot": "ms per token", "ttft": "ms to the first token"}
ARMS = ("reference_ms", "candidate_ms")
ROW, FRAME = 34.0, 52.0  # height of a row, and of the space around all rows, in points
JITTER = 0.16  # largest vertical offset of a dot, in rows, so that samples of equal time do not overlap
ANEW = (
    "A dot is one pair: original and plan timed one right after the other. The bar is the 95 % interval of the median, "
    "which is the line; the shaded band is how far this machine's noise moves the original against itself."
)
RAW = "Every sample of both arms. The line is the median; dots of one pair are joined."


@dataclass(frozen=True)
class Race:
    """One metric in one shape of work.

    Args:
        metric: "end_to_end", "tpot" or "ttft".
        bucket: the shape, such as "b1/p64/n32"; empty if there is only one.
        speedup: ratio, low, high and pairs.
        reference_ms, candidate_ms: paired samples; empty in records of earlier versions.
    """

    metric: str
    bucket: str
    speedup: Mapping[str, Any]
    reference_ms: tuple[float, ...] = ()
    candidate_ms: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return f"{METRICS[self.metric].removeprefix('ms ')}{f', {self.bucket}' if self.bucket else ''}"

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """Both arms' times in ms, for the pairs that have both."""
        times = zip(self.reference_ms, self.candidate_ms, strict=False)
        return [(a, b) for a, b in times if n.known(a) and n.known(b) and a > 0 and b > 0]


def races(latency: Mapping[str, Any]) -> list[Race]:
    """Return every bucket of every metric."""
    buckets = latency["buckets"] or {"": {metric: latency[metric] for metric in METRICS}}
    samples = latency.get("samples") or {}
    if "reference_ms" in samples:  # as earlier versions wrote them
        samples = by_bucket({arm: samples[arm] for arm in ARMS}, list(buckets))
    return [
        Race(
            metric,
            name if len(buckets) > 1 else "",
            speedups[metric],
            *(tuple(samples.get(name, {}).get(arm, {}).get(metric, ())) for arm in ARMS),
        )
        for metric in METRICS
        for name, speedups in buckets.items()
        if metric in speedups and n.known(speedups[metric]["ratio"])
    ]


def chapter(record: Mapping[str, Any]) -> Chapter | None:
    """Show the timing of the plan against the original; None if there is none."""
    latency = record["latency"]
    if latency is None:
        return None
    found = races(latency)
    told = [badge(latency["verdict"]), " ", sentence(latency["reason"]) or "Timed in interleaved pairs."]
    body = [element("p", *told), paragraphs(f"Warning: {warning.rstrip('.')}." for warning in latency["warnings"])]
    if found:
        listed = fold("The same as a table", table(_table(found), "Speed-up by metric"))
        faster = {race.speedup["ratio"] >= 1 for race in found}
        keys = {"after": "faster", "before": "slower"} if len(faster) > 1 else None
        ratios = d.chart(
            lambda sheet, narrow: _ratios(sheet, narrow, found, latency["noise"]),
            f"Speed-up of every pair. {'; '.join(map(_said, found))}.",
            height=ROW * len(found) + FRAME,
        )
        body.append(figure(ratios, ANEW, listed, keys=keys))
    timed = [race for race in found if race.pairs]
    if timed:
        rows = {metric: [race for race in timed if race.metric == metric] for metric in METRICS}
        rows = {metric: races for metric, races in rows.items() if races}
        tallest = max(map(len, rows.values()))
        raw = d.chart(
            lambda sheet, narrow: _raw(sheet, narrow, rows),
            f"Times of both arms. {'; '.join(map(_spread, timed))}.",
            height=2 * ROW * tallest + FRAME,
            narrow_height=(2 * ROW * tallest + FRAME) * len(rows),
        )
        all_samples = fold("All samples", table(_samples(timed), "All samples, ms"))
        body.append(figure(raw, RAW, all_samples, keys={"before": "original", "after": "tuned"}))
    return Chapter("latency", "Latency", joined(body))


def _said(race: Race) -> str:
    bounds = n.interval(race.speedup["low"], race.speedup["high"])
    return f"{race.name} {n.ratio(race.speedup['ratio'])}" + (f" ({bounds})" if bounds else "")


def _spread(race: Race) -> str:
    before, after = zip(*race.pairs, strict=True)
    return f"{race.name}: median {n.milliseconds(median(before))} ms before, {n.milliseconds(median(after))} ms after"


def _table(found: Sequence[Race]) -> Table:
    rows = tuple(
        (
            race.name,
            n.ratio(race.speedup["ratio"]),
            n.interval(race.speedup["low"], race.speedup["high"]),
            n.count(race.speedup["pairs"]),
        )
        for race in found
    )
    return Table(("metric", "speed-up", "95 % interval", "pairs"), "lrrr", rows)


def _samples(found: Sequence[Race]) -> Table:
    return Table(("metric", "pair", "original ms", "tuned ms", "speed-up"), "lrrrr", tuple(_rows(found)))


def _rows(found: Sequence[Race]) -> Iterator[tuple[str, ...]]:
    for race in found:
        for k, (before, after) in enumerate(race.pairs, 1):
            yield race.name, str(k), n.milliseconds(before), n.milliseconds(after), n.ratio(before / after)


def _jitter(index: int) -> float:
    """Return a vertical offset that is the same in each run and differs from the neighbours' offsets."""
    return JITTER * (((index * 7) % 5) / 2 - 1)


def _ratios(sheet: Figure, narrow: bool, found: Sequence[Race], noise: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes = sheet.subplots()
    if n.known(noise):
        axes.axvspan(1 - noise, 1 + noise, color=d.SOFT, linewidth=0)
    axes.axvline(1, color=d.LINE, linewidth=1.2)
    values = [1.0]
    for place, race in enumerate(found):
        ratios = [before / after for before, after in race.pairs]
        middle, low, high = (race.speedup[key] for key in ("ratio", "low", "high"))
        colour = d.AFTER if middle >= 1 else d.BEFORE
        for k, ratio in enumerate(ratios):
            (dot,) = axes.plot(ratio, place + _jitter(k), "o", color=colour, alpha=0.55, markersize=5, zorder=3)
            d.tip(dot, f"{race.name}, pair {k + 1}: {n.ratio(ratio)}")
        if n.known(low) and n.known(high):
            axes.plot([low, high], [place, place], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
            values += [low, high]
        axes.plot([middle, middle], [place - 0.3, place + 0.3], color=colour, linewidth=2, zorder=4)
        values += [middle, *ratios]
    reach = max(values)
    for place, race in enumerate(found):
        axes.text(reach * 1.03, place, n.ratio(race.speedup["ratio"]), va="center", weight="bold")
    axes.set_xlim(min(0.9, *values) * 0.97, reach * (1.2 if narrow else 1.12))
    axes.set_ylim(len(found) - 0.45, -0.55)
    axes.set_yticks(range(len(found)), [race.name for race in found])
    _plain(axes)
    ticks = MaxNLocator(4 if narrow else 8, steps=[1, 2, 5, 10]).tick_values(*axes.get_xlim())
    low, high = axes.get_xlim()
    axes.set_xticks(sorted({1.0} | {float(tick) for tick in ticks if low < tick < high}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xlabel("times as fast as the original")


def _raw(sheet: Figure, narrow: bool, rows: Mapping[str, Sequence[Race]]) -> None:
    from matplotlib.ticker import MaxNLocator

    grid = (len(rows), 1) if narrow else (1, len(rows))
    for axes, (metric, found) in zip(sheet.subplots(*grid, squeeze=False).flat, rows.items(), strict=True):
        longest = 0.0
        for index, race in enumerate(found):
            before, after = zip(*race.pairs, strict=True)
            top, bottom = 2.0 * index, 2.0 * index + 1
            for k, (was, now) in enumerate(race.pairs):
                heights = [top + _jitter(k), bottom + _jitter(k)]
                axes.plot([was, now], heights, color=d.LINE, linewidth=0.8, zorder=1)
                (dot,) = axes.plot(was, heights[0], "o", color=d.BEFORE, alpha=0.6, markersize=5)
                d.tip(dot, f"pair {k + 1}, original: {n.milliseconds(was)} ms")
                (dot,) = axes.plot(now, heights[1], "o", color=d.AFTER, alpha=0.6, markersize=5)
                d.tip(dot, f"pair {k + 1}, tuned: {n.milliseconds(now)} ms")
            for place, times, colour in ((top, before, d.BEFORE), (bottom, after, d.AFTER)):
                axes.plot([median(times)] * 2, [place - 0.34, place + 0.34], color=colour, linewidth=2, zorder=4)
            longest = max(longest, *before, *after)
            if race.bucket:
                axes.text(0, top - 0.4, f" {race.bucket}", va="bottom", fontsize=d.TEXT - 2, color=d.MUTED)
        axes.set_title(f"{METRICS[metric]}{', ms' if metric == 'end_to_end' else ''}")
        axes.set_xlim(0, longest * 1.06)
        axes.set_ylim(2 * len(found) - 0.4, -0.7)
        axes.set_yticks(range(2 * len(found)), ["original", "tuned"] * len(found))
        _plain(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4))


def _plain(axes: Axes) -> None:
    """Hide the vertical axis line and ticks, and draw a vertical grid."""
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
