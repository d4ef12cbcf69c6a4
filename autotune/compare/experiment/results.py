"""What came of an experiment: values, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ExperimentError, PlanError
from ...validate import Latency, Quality, Speedup, Verdict

if TYPE_CHECKING:
    from rich.console import Console

    from .pareto import Point


@dataclass(frozen=True)
class Cell:
    """One candidate in one bucket of the workload.

    Args:
        bucket: "b1/p64/n32".
        verdict, reason: of this bucket alone.
        ttft, tpot, end_to_end: speed-ups over the control.
        tokens_per_s, control_tokens_per_s: new tokens of the whole batch per second of a request, medians.
    """

    bucket: str
    verdict: Verdict
    reason: str
    ttft: Speedup
    tpot: Speedup
    end_to_end: Speedup
    tokens_per_s: float
    control_tokens_per_s: float


@dataclass(frozen=True)
class Outcome:
    """One arm and what became of it.

    Args:
        name, description, fingerprint: of the arm.
        verdict: PASS, FAIL, INCONCLUSIVE or ERROR; a control that could be measured is PASS.
        reason: the sentence that decided.
        quality: against the control; None where it was not judged.
        latency: against the control over all buckets; None for the control and where it did not come to that.
        cells: by bucket.
        p_value: chance of so clear a gain were there none (`verdicts.chance`); NaN where there is no figure.
        stored_bytes: the weights that serve it, what they share with the control's included.
        peak_bytes: those and what the largest request adds: measured on a GPU, weights and a full KV cache on a CPU.
        notes: what a reader should know.
    """

    name: str
    description: str
    fingerprint: str
    verdict: Verdict
    reason: str
    quality: Quality | None = None
    latency: Latency | None = None
    cells: tuple[Cell, ...] = ()
    p_value: float = float("nan")
    stored_bytes: float = float("nan")
    peak_bytes: float = float("nan")
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """An experiment's outcome.

    Args:
        name, version: of the experiment; another arm or workload under the same name is another version.
        verdict: PASS where some candidate passes, FAIL where all fail, ERROR where all do; INCONCLUSIVE otherwise.
        reason: one sentence.
        tier, objective: what was asked for.
        noise: what the control seemed to gain on itself, a fraction.
        outcomes: the control's first.
        created: ISO 8601, UTC.
        seconds: time this run took.
        warnings: what the measurement noticed about itself.
    """

    name: str
    version: int
    verdict: Verdict
    reason: str
    tier: str
    objective: str
    noise: float
    outcomes: tuple[Outcome, ...]
    created: str = ""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    def pareto(self) -> tuple[Point, ...]:
        """The arms that no other beats in speed, quality and memory at once, the fastest first."""
        from .pareto import front, points

        return front(points(self))

    def chart(self, path: str | Path) -> Path:
        """Draw speed against quality into an .svg, .png or .pdf file.

        Raises:
            PackageError: matplotlib is not installed.
            ExperimentError: the file's ending is another, or it cannot be written.
        """
        from .chart import draw

        return draw(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Everything, fit for JSON: what was not measured is None."""
        from ...tune import codec

        encoded: dict[str, Any] = codec.encode(self)
        return encoded

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        from ...report.markdown import document
        from .sections import headline, sections

        return document(headline(self), sections(self))

    def to_terminal(self, console: Console | None = None) -> None:
        """Draw with rich on `console`, by default standard output."""
        from rich.console import Console

        from ...report.terminal import show
        from .pareto import plotted, points
        from .sections import headline, sections

        console = console or Console()
        show(headline(self), sections(self), console)
        console.print(plotted(points(self)), highlight=False, markup=False)

    def __str__(self) -> str:
        from ...report.terminal import text
        from .pareto import plotted, points
        from .sections import headline, sections

        return text(headline(self), sections(self)) + "\n" + plotted(points(self))


def read(record: Mapping[str, Any]) -> Result:
    """The result of `Result.to_dict`.

    Raises:
        ExperimentError: it is none, or of another version of autotune.
    """
    from ...tune import codec

    try:
        result: Result = codec.decode(Result, dict(record), "result")
    except PlanError as error:
        raise ExperimentError(f"the kept result cannot be read ({error}); run the experiment again") from error
    return result
