"""What a report says of the candidates: those of the plan, those that failed, and those that were not tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from . import numbers as n
from .layout import Section, Table

TRIED = {"accepted", "rejected", "inconclusive"}
UNTRIED = {"error", "blocked", "unreached"}  # outcomes of candidates that were called for and not judged


def contributions(record: Mapping[str, Any]) -> Section | None:
    """Return the gain from each transform of the plan."""
    found = record.get("contributions")  # records of earlier versions have none
    if not found:
        return None
    note = (
        "The plan against the plan without one of its transforms, in a few interleaved pairs: above 1x it is worth its "
        "place. What two of them save alike shows with neither."
    )
    columns = ("transform", "phase", "speed-up", "95 % interval", "whole request", "")
    return Section(
        "What each transform contributes", (note,), Table(columns, "llrrrl", tuple(map(_contributed, found)))
    )


def _contributed(found: Mapping[str, Any]) -> tuple[str, ...]:
    own, whole = found["speedup"], found["end_to_end"]
    figures = (
        (n.ratio(own["ratio"]), n.interval(own["low"], own["high"]), n.ratio(whole["ratio"])) if own else ("",) * 3
    )
    return (found["transform"], found["target"], *figures, found["reason"])


def could_not_be_tried(record: Mapping[str, Any]) -> Section | None:
    """Return the candidates that were called for and not judged: their prediction, and the reason."""
    failed = [t for t in record["trials"] if t["outcome"] in UNTRIED]
    if not failed:
        return None
    rows = tuple(
        (t["candidate"], n.ratio(t["predicted"]), n.duration(t["seconds"]), f"{t['outcome']}: {t['reason']}")
        for t in failed
    )
    wanted = len(failed) + sum(t["outcome"] in TRIED for t in record["trials"])
    note = f"{len(failed)} of the {wanted} candidates that were called for. Predicted is the best the roofline allows."
    return Section("Could not be tried", (note,), Table(("candidate", "predicted", "took", "outcome"), "lrrl", rows))


def tried(record: Mapping[str, Any]) -> Section | None:
    """Return the candidates that were judged: prediction, measurement, and the reason of the outcome."""
    ran = [t for t in record["trials"] if t["outcome"] in TRIED]
    if not ran:
        return None
    rows = tuple(
        (
            t["candidate"],
            n.ratio(t["predicted"]),
            n.ratio(t["speedup"]),
            n.divergence(t["quality"]["mean_kld"] if t["quality"] else None),
            n.duration(t["seconds"]),
            f"{t['outcome']}: {t['reason']}",
        )
        for t in ran
    )
    accepted = sum(t["outcome"] == "accepted" for t in ran)
    note = (
        f"{accepted} of {len(ran)} candidates accepted. Predicted is the best the roofline allows; "
        "measured is against what was accepted before; KLD is the mean KL divergence from the original in nat."
    )
    columns = ("candidate", "predicted", "measured", "KLD", "took", "outcome")
    return Section("Tried", (note,), Table(columns, "lrrrrl", rows))


def not_tried(record: Mapping[str, Any]) -> Section | None:
    """Return the candidates that were not called for or not available, and why. A skipped step takes one line."""
    ruled_out = [t for t in record["trials"] if t["outcome"] not in TRIED | UNTRIED]
    if not ruled_out:
        return None
    rows = tuple(_ruled_out(shared, list(trials)) for shared, trials in groupby(ruled_out, _question))
    return Section("Ruled out", table=Table(("candidate", "predicted", "outcome"), "lrl", rows))


def _question(trial: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return a key that is equal for candidates of one step that were ruled out together."""
    alone = trial["candidate"] if trial["predicted"] is not None or trial["outcome"] != "skipped" else ""
    return trial["step"], f"{trial['outcome']}: {trial['reason']}", alone


def _ruled_out(shared: tuple[str, str, str], trials: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    step, outcome, _ = shared
    several = f"{step} ({len(trials)} candidates)"
    return trials[0]["candidate"] if len(trials) == 1 else several, n.ratio(trials[0]["predicted"]), outcome
