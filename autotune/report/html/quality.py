"""Show quality: the plan's output distribution against the original's, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import numbers as n
from .. import sections
from ..layout import Table
from . import drawing as d
from .elements import Chapter, Html, badge, element, figure, fold, joined, section, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = {"p50_kld": "median", "p90_kld": "90 %", "p99_kld": "99 %", "max_kld": "largest"}
LEAST = 1e-9  # nat; smaller divergences are drawn at this value, because a logarithmic axis has no zero
CAPTION = (
    "Divergence of single tokens by how sure the original was of its own choice. Where it was not sure, several tokens "
    "would have done and some divergence is harmless; where it was, the dots should be far to the left."
)


def chapter(record: Mapping[str, Any]) -> Chapter | None:
    """Show the result of the plan's exam; None if there was no exam."""
    found = sections.quality(record)
    if found is None:
        return None
    verdict = record["quality"]["verdict"]
    first, *rest = found.sentences
    body = [element("p", badge(verdict), " ", first), section(replace(found, sentences=tuple(rest)))]
    if certainty := record["quality_detail"].get("certainty"):
        body.append(_figure(certainty))
    return Chapter("quality", "Quality", joined(body))


def label(found: Mapping[str, Any]) -> str:
    """Say in words how sure the original was of these tokens."""
    if found["low"] <= 0:
        return f"unsure (below {n.percent(found['high'])})"
    if found["high"] >= 1:
        return f"sure (over {n.percent(found['low'])})"
    return f"likely ({n.percent(found['low'])} to {n.percent(found['high'])})"


def _figure(certainty: Sequence[Mapping[str, Any]]) -> Html:
    described = "; ".join(
        f"{label(part)}, {n.count(part['tokens'])} tokens: "
        + ", ".join(f"{name} {n.divergence(part[key])}" for key, name in QUANTILES.items())
        for part in certainty
    )
    drawing = d.chart(
        lambda sheet, narrow: _draw(sheet, narrow, certainty),
        f"KL divergence by confidence, nat. {described}.",
        height=54 + 58 * len(certainty),
    )
    rows = tuple(
        (
            label(part),
            n.count(part["tokens"]),
            *(n.divergence(part[key]) for key in QUANTILES),
            n.percent(part["same_top"], 1),
        )
        for part in certainty
    )
    columns = ("original was", "tokens", *QUANTILES.values(), "same top token")
    listed = table(Table(columns, "lrrrrrr", rows), "KL divergence by confidence, nat")
    return figure(drawing, CAPTION, fold("The same as a table", listed))


def _draw(sheet: Figure, narrow: bool, certainty: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes = sheet.subplots()
    for place, part in enumerate(certainty):
        values = {key: max(part[key], LEAST) for key in QUANTILES}
        axes.plot([values["p50_kld"], values["max_kld"]], [place] * 2, color=d.AFTER, linewidth=1, zorder=2)
        axes.plot([values["p50_kld"], values["p90_kld"]], [place] * 2, color=d.AFTER, linewidth=6, alpha=0.4, zorder=2)
        for key, size in zip(QUANTILES, (9, 7, 6, 5), strict=True):
            (dot,) = axes.plot(
                values[key],
                place,
                "o",
                color=d.AFTER,
                markerfacecolor=d.PANEL if key == "max_kld" else d.AFTER,
                markersize=size,
                zorder=3,
            )
            d.tip(dot, f"{label(part)}: {QUANTILES[key]} {n.divergence(part[key])} nat")
        for key, away in (("p50_kld", 9), ("p99_kld", -18)):
            text = f"{QUANTILES[key]} {n.divergence(part[key])}"
            axes.annotate(
                text,
                (values[key], place),
                xytext=(0, away),
                textcoords="offset points",
                ha="center",
                fontsize=d.TEXT - 1.5,
                color=d.MUTED,
            )
    names = [f"{label(part)}\n{n.count(part['tokens'])} tokens" for part in certainty]
    axes.set_yticks(range(len(certainty)), [name.replace(" (", "\n(") for name in names] if narrow else names)
    axes.set_ylim(len(certainty) - 0.55, -0.7)
    low = min(max(part["p50_kld"], LEAST) for part in certainty)
    high = max(max(part["max_kld"], LEAST) for part in certainty)
    axes.set(xscale="log", xlim=(low / 8, high * 4), xlabel="KL divergence of a token, nat")
    axes.xaxis.set_major_locator(LogLocator(10, numticks=5 if narrow else 9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
