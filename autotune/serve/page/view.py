"""What the page shows of a model besides its figures: the plan and why, its numbers when tuned, the lines of tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...live.status import State
from ...report import html
from ...report import numbers as n
from ...report.layout import sentence
from ..watching import may

if TYPE_CHECKING:
    from ...live.status import Status
    from ...tune.plan import Plan
    from ..watching import TuningLog

ADDED, REPLACED = " + ", " instead of "  # between the transforms of a candidate, and before what it would replace


def view(
    name: str, status: Status, plan: Plan | None, record: Mapping[str, Any] | None, log: TuningLog
) -> dict[str, Any]:
    """Return the page's contents as JSON's types.

    Args:
        name: that the model is served under.
        status: the model's.
        plan: what tuning found, whether it serves or not; None before.
        record: of its report; None before.
        log: the lines of tuning.
    """
    found = [str(transform) for transform in plan.transforms] if plan is not None else []
    names = list(status.transforms) or found
    return {
        "model": name,
        "state": str(status.state),
        "lead": lead(status, record),
        "watch": status.watch,
        "may": may(status, plan),
        "plan": {
            "serves": bool(status.transforms),
            "transforms": [{"name": name, "reasons": list(reasons(name, record, status))} for name in names],
        },
        "tiles": [list(tile) for tile in html.tiles(record)] if record is not None else [],
        "lines": [{"at": n.duration(float(int(line.at_s))), "text": line.text} for line in log.lines()],
        "count": log.count,
        "has_report": record is not None,
    }


def lead(status: Status, record: Mapping[str, Any] | None) -> str:
    """Return a sentence about the state: of a plan that serves, its numbers; while tuning goes on, what serves."""
    if status.state is State.TUNING:
        proven = len(status.transforms)
        serves = f"{proven} transform{'s' if proven > 1 else ''} proven so far" if proven else "the original"
        return f"A plan is searched for. Meanwhile the model serves with {serves}."
    if status.state is State.TUNED and record is not None and record["transforms"]:
        return html.lead(record)
    return sentence(status.detail)


def reasons(name: str, record: Mapping[str, Any] | None, status: Status) -> Iterator[str]:
    """Yield why a transform is in the plan: the trial that accepted it last, then what it contributes.

    Args:
        name: the transform in words.
    """
    if record is None or status.state is State.TUNING:
        yield "Proven so far; tuning goes on." if status.state is State.TUNING else "No trial is recorded."
        return
    trials = [t for t in record["trials"] if t["outcome"] == "accepted" and name in _parts(t["candidate"])]
    if trials:
        others = len(_parts(trials[-1]["candidate"])) - 1
        together = f" together with {others} other{'s' if others > 1 else ''}" if others else ""
        yield sentence(f"accepted{together}: {trials[-1]['reason']}")
    else:
        yield "No trial of it is recorded: the plan was kept from an earlier tuning."
    for part in record.get("contributions") or ():
        if part["transform"] == name:
            yield _contributed(part)


def _parts(candidate: str) -> list[str]:
    return candidate.partition(REPLACED)[0].split(ADDED)


def _contributed(part: Mapping[str, Any]) -> str:
    own = part["speedup"]
    if not own:
        return sentence(f"its own share was not measured: {part['reason']}")
    bounds = n.interval(own["low"], own["high"])
    measured = n.ratio(own["ratio"]) + (f" ({bounds})" if bounds else "")
    return f"With it, {part['target']} is {measured} as fast as without it."
