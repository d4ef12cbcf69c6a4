"""Draws speed against quality with matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ExperimentError, PackageError
from ...machine.cache_dir import expanded
from ...report import numbers as n
from .pareto import front, points

if TYPE_CHECKING:
    from .outcomes import Outcomes

FORMATS = (".svg", ".png", ".pdf")
LINEAR_UP_TO = 1e-4  # nats below which the axis is linear, because the control is at zero
NEUTRAL = "#57606a"  # colour of the control and of the front
COLOURS = {"pass": "#1a7f37", "fail": "#cf222e", "inconclusive": "#9a6700", "error": NEUTRAL}


def require_format(path: str | Path) -> Path:
    """Check a chart's path before the long work begins, and return it.

    Raises:
        ExperimentError: the path's ending is not a known format.
    """
    path = expanded(path)
    if path.suffix not in FORMATS:
        raise ExperimentError(f"{path} cannot be drawn; expected a file that ends in {', '.join(FORMATS)}")
    return path


def draw(result: Outcomes, path: str | Path) -> Path:
    """Draw the chart: a point for each arm, intervals as bars, and a line through the arms that no other arm beats.

    Args:
        path: an .svg, .png or .pdf file.

    Raises:
        PackageError: matplotlib is not installed.
        ExperimentError: the path's ending is not a known format, or the file cannot be written.
    """
    path = require_format(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PackageError("a chart needs matplotlib: pip install 'matplotlib>=3.10'") from error

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    outcomes = {outcome.name: outcome for outcome in result.outcomes}
    shown = [p for p in points(result) if math.isfinite(p.mean_kld)]
    for point in shown:
        outcome = outcomes[point.name]
        gain = getattr(outcome.latency, result.objective) if outcome.latency else None
        bars = [[point.speedup - gain.low], [gain.high - point.speedup]] if gain else None
        colour, verdict = (COLOURS[outcome.verdict], f"{outcome.verdict.value}, ") if gain else (NEUTRAL, "")
        axes.errorbar(point.mean_kld, point.speedup, yerr=bars, fmt="o", color=colour, capsize=3)
        label = f"{point.name}: {verdict}{n.scaled(point.stored_bytes, 'B')}"
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        where = (point.mean_kld, point.speedup)
        axes.annotate(label, where, xytext=(7, -12), textcoords="offset points", fontsize=8, bbox=box)
    best = sorted((p for p in front(points(result)) if p in shown), key=lambda p: p.mean_kld)
    axes.plot([p.mean_kld for p in best], [p.speedup for p in best], "--", color=NEUTRAL, linewidth=1, zorder=0)
    axes.set_xscale("symlog", linthresh=LINEAR_UP_TO)
    axes.set_xlim(left=-LINEAR_UP_TO / 2)
    axes.set_xlabel("mean KL divergence from the control, nat")
    axes.set_ylabel(f"speed-up ({result.objective})")
    axes.set_title(f"{result.name}, version {result.version}: {result.verdict.value}", fontsize=10)
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ExperimentError(f"the chart {path} cannot be written: {error.strerror}") from error
    return path
