"""A run as bars: how long a token, a prompt and a batch take in each runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.measures import Metric
from benchmarks.results import Run, Spread

SHOWN = ("tpot_64", "ttft_512", "rate_16", "rate_4")  # the first three of these that were measured
OWN, PEER = "#1f6f8b", "#b8c4cc"


def draw(run: Run, metrics: Sequence[Metric], file: Path) -> None:
    """Write a picture in the format that the file's suffix says.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = {metric.name: metric for metric in metrics}
    panels = [known[name] for name in SHOWN if name in known][:3]
    results = [result for result in run.results if not result.missing][::-1]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.4 * len(panels), 0.9 + 0.34 * len(results)), sharey=True, squeeze=False
    )
    for metric, axis in zip(panels, axes[0], strict=True):
        found = [result.spread(metric.name) or Spread(0.0, 0.0, 0.0) for result in results]
        medians = [spread.median for spread in found]
        whiskers = [[s.median - s.low for s in found], [s.high - s.median for s in found]]
        colours = [OWN if result.name.startswith("autotune") else PEER for result in results]
        axis.barh([result.label for result in results], medians, xerr=whiskers, color=colours, ecolor="#555555")
        better = "less" if metric.smaller_is_better else "more"
        axis.set_title(f"{metric.title}, {metric.unit} ({better} is better)", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{run.model}, {run.machine['name']}, {run.threads} threads", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
