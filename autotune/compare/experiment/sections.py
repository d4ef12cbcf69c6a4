"""Sections of sentences and tables that show an experiment's result. Pure."""

from __future__ import annotations

from ...report import numbers as n
from ...report.layout import Section, Table, sentence
from ...validate import Speedup
from .outcomes import Outcome, Outcomes
from .pareto import front, points


def headline(result: Outcomes) -> str:
    return f"Experiment {result.name}, version {result.version}: {result.verdict.value}"


def sections(result: Outcomes) -> tuple[Section, ...]:
    """All sections, the verdicts first."""
    found = (verdicts(result), buckets(result), quality(result), choice(result), notes(result))
    return tuple(section for section in found if section is not None)


def verdicts(result: Outcomes) -> Section:
    candidates = result.outcomes[1:]
    rows = tuple(
        (outcome.name, *_gain(outcome, result.objective), f"{outcome.verdict.value}: {outcome.reason}")
        for outcome in candidates
    )
    told = (
        sentence(result.reason),
        f"Judged by {result.objective} and quality tier {result.tier}, against {result.outcomes[0].description}.",
        f"The control seemed to gain {n.percent(result.noise, 1)} on itself; a gain counts from twice that.",
        *_several(len(candidates)),
    )
    table = Table(("candidate", "speed-up", "95 % interval", "verdict"), "lrrl", rows)
    return Section("Verdicts", told, table)


def _several(candidates: int) -> tuple[str, ...]:
    if candidates < 2:
        return ()
    return (f"A gain stands where it does among {candidates} candidates at once (sign test, Holm's procedure).",)


def _gain(outcome: Outcome, objective: str) -> tuple[str, str]:
    if outcome.latency is None:
        return n.MISSING, ""
    gain: Speedup = getattr(outcome.latency, objective)
    return n.ratio(gain.ratio), n.interval(gain.low, gain.high)


def buckets(result: Outcomes) -> Section | None:
    """Every candidate in every bucket of the workload."""
    rows = tuple(
        (
            outcome.name,
            cell.bucket,
            n.ratio(cell.ttft.ratio),
            n.ratio(cell.tpot.ratio),
            n.ratio(cell.end_to_end.ratio),
            n.interval(cell.end_to_end.low, cell.end_to_end.high),
            f"{n.milliseconds(cell.control_tokens_per_s)} to {n.milliseconds(cell.tokens_per_s)}",
            cell.verdict.value,
        )
        for outcome in result.outcomes
        for cell in outcome.cells
    )
    if not rows:
        return None
    columns = ("candidate", "bucket", "first token", "per token", "request", "95 % interval", "tokens/s", "alone")
    note = "Speed-ups by batch, prompt and new tokens; each bucket's verdict is its own, the candidate's is for all."
    return Section("By bucket", (note,), Table(columns, "llrrrrrl", rows))


def quality(result: Outcomes) -> Section | None:
    judged = [(outcome.name, outcome.quality) for outcome in result.outcomes if outcome.quality is not None]
    if not judged:
        return None
    rows = tuple(
        (
            name,
            found.verdict.value,
            n.divergence(found.mean_kld),
            n.divergence(found.mean_kld_high),
            n.divergence(found.p99_kld),
            n.percent(found.same_top, 1),
            f"{found.ppl_ratio:.4f}" if n.known(found.ppl_ratio) else n.MISSING,
            n.count(found.tokens),
        )
        for name, found in judged
    )
    columns = ("candidate", "verdict", "mean KLD", "at most", "p99", "same top", "perplexity", "tokens")
    note = (
        f"KL divergence from the control's model as it is, in nat; tier {result.tier}. Each bound is a candidate's own."
    )
    return Section("Quality", (note,), Table(columns, "llrrrrrr", rows))


def choice(result: Outcomes) -> Section | None:
    """Speed, quality and memory of every arm, and which arms are not beaten by any other."""
    shown = points(result)
    if not shown:
        return None
    best, outcomes = front(shown), {outcome.name: outcome for outcome in result.outcomes}
    rows = tuple(
        (
            f"{k} {point.name}",
            n.ratio(point.speedup),
            n.divergence(point.mean_kld),
            n.scaled(point.stored_bytes, "B"),
            n.scaled(outcomes[point.name].peak_bytes, "B"),
            "yes" if point in best else "",
        )
        for k, point in enumerate(shown, 1)
    )
    note = "On the front is what no other arm beats in speed, divergence and weights at once, by point estimates."
    columns = ("arm", "speed-up", "mean KLD", "weights", "at most", "on the front")
    return Section("Speed against quality", (note,), Table(columns, "lrrrrl", rows))


def notes(result: Outcomes) -> Section:
    """Describe the arms, and list the warnings."""
    told = [f"{o.name}: {'; '.join((o.description, *o.notes))}." for o in result.outcomes]
    told += [sentence(warning) for warning in result.warnings]
    told.append(f"Measured in {n.duration(result.seconds)}, until {result.created}.")
    return Section("What was compared", tuple(told))
