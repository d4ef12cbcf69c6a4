"""A run as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.measures import Metric
from benchmarks.results import Result, Run, Spread, roofline_share, speedup

NONE = "-"
DECODE = "tpot_64"  # what the share of the roofline is computed from


def markdown(run: Run, metrics: Sequence[Metric], rivals: Mapping[str, Sequence[str]]) -> str:
    """The whole report.

    Args:
        run: what was found.
        metrics: the columns.
        rivals: result name to the names it is compared with one to one.
    """
    machine, bandwidth = run.machine, run.bandwidth
    measured = (
        f"{_cell(bandwidth.scaled(1e-9))} GB/s measured beside the requests" if bandwidth else "bandwidth unknown"
    )
    parts = [
        f"# {run.model}: the runtimes side by side",
        f"{machine['name']} ({machine['capability']}), {run.threads} threads, "
        f"{measured}; {run.rounds} interleaved rounds, {run.created}, "
        f"{run.seconds / 60:.0f} min in all. Median of the rounds, lowest and highest in brackets.",
        "## Speed",
        speeds(run, metrics),
    ]
    if run.of(run.reference):
        parts += [f"## Times as fast as {_label(run, run.reference)}, in the same round", ratios(run, metrics)]
    if duels := one_to_one(run, metrics, rivals):
        parts += ["## One to one, in the same round", duels]
    parts += ["## Quality, memory, time to ready", costs(run, metrics)]
    if missing := [f"* {r.label}: {r.missing}" for r in run.results if r.missing]:
        parts += ["## Missing", "\n".join(missing)]
    titles = {metric.name: metric.title for metric in metrics}
    notes = [f"* {r.label}: {note}" for r in run.results for note in r.notes]
    notes += [f"* {r.label}, {titles.get(m, m)}: {why}" for r in run.results for m, why in r.failures.items()]
    if notes:
        parts += ["## Notes", "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def speeds(run: Run, metrics: Sequence[Metric]) -> str:
    header = ["runtime", *(f"{metric.title}, {metric.unit}" for metric in metrics)]
    return grid(header, [[r.label, *(_cell(r.spread(m.name)) for m in metrics)] for r in _ran(run)])


def ratios(run: Run, metrics: Sequence[Metric]) -> str:
    reference = run.of(run.reference)
    rows = [
        [r.label, *(_cell(speedup(reference, r, m), "x") for m in metrics)] for r in _ran(run) if r is not reference
    ]
    return grid(["runtime", *(metric.title for metric in metrics)], rows)


def one_to_one(run: Run, metrics: Sequence[Metric], rivals: Mapping[str, Sequence[str]]) -> str:
    """Each result with rivals against those of them that ran; empty where there are none."""
    rows = [
        [f"{r.label} : {rival.label}", *(_cell(speedup(rival, r, m), "x") for m in metrics)]
        for r in _ran(run)
        for rival in (run.of(name) for name in rivals.get(r.name, ()))
        if rival is not None
    ]
    return grid(["", *(metric.title for metric in metrics)], rows) if rows else ""


def costs(run: Run, metrics: Sequence[Metric]) -> str:
    header = [
        "runtime",
        "mean KL divergence, nat",
        "same top token",
        "share of the memory roofline",
        "weights, MB",
        "process, MB",
        "peak, MB",
        "ready cold, s",
        "ready warm, s",
    ]
    return grid(header, [_costs(run, r, metrics) for r in _ran(run)])


def _costs(run: Run, result: Result, metrics: Sequence[Metric]) -> list[str]:
    decode = next((metric for metric in metrics if metric.name == DECODE), None)
    share = roofline_share(result, decode) if decode else None
    quality = result.worst
    if result.name == run.reference:
        fidelity = ["reference", "reference"]
    elif quality is None:
        fidelity = ["not available", "not available"]
    else:
        fidelity = [f"{quality.mean_kld:.5f}", f"{quality.same_top:.1%}"]
    sizes = (result.stored_bytes, result.rss_bytes, result.peak_bytes)
    return [
        result.label,
        *fidelity,
        _cell(share.scaled(100) if share else None, " %"),
        *(NONE if size is None else f"{size / 1e6:.0f}" for size in sizes),
        *(NONE if seconds is None else number(seconds) for seconds in (result.cold_s, result.warm_s)),
    ]


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _cell(found: Spread | None, unit: str = "") -> str:
    if found is None:
        return NONE
    return f"{number(found.median)}{unit} ({number(found.low)}-{number(found.high)})"


def _ran(run: Run) -> list[Result]:
    return [result for result in run.results if not result.missing]


def _label(run: Run, name: str) -> str:
    return next(result.label for result in run.results if result.name == name)
