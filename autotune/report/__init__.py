"""What was measured, tried and decided, to be read.

    Report -> record (a dictionary fit for JSON) -> sections (what is worth saying) -> terminal, markdown, html

A record stands on its own: one read back from a plan or a report.json is shown exactly like a fresh one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from ..diagnose.diagnosis import Diagnosis
from ..errors import PlanError
from ..machine.hardware import Hardware
from ..profile import Profile
from ..transforms import Transform
from ..tune.contributions import Contribution
from ..tune.plan import Trial
from ..validate import Latency, Quality
from ..workload import Phase

if TYPE_CHECKING:
    from rich.console import Console

    from ..profile.ncu import Reading


class Drawn:
    """Anything that has a record can be shown."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, fit for JSON: what was not measured is None."""
        raise NotImplementedError

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        from .markdown import render

        return render(self.to_dict())

    def to_html(self) -> str:
        """One self-contained page with charts: no script, nothing from a network.

        Raises:
            PackageError: matplotlib, which draws, is not installed.
        """
        from .html import render

        return render(self.to_dict())

    def to_terminal(self, console: Console | None = None) -> None:
        """Draw with rich on `console`, by default standard output."""
        from .terminal import draw

        draw(self.to_dict(), console)

    def with_calls(self, served: int, bypassed: Mapping[str, int]) -> Self:
        """The same report, later.

        Args:
            served: calls served by the plan since.
            bypassed: calls that went to the original since, by reason.
        """
        raise NotImplementedError

    def without_original(self, weights_bytes: int | None) -> Self:
        """The same report, after the original was let go.

        Args:
            weights_bytes: what the weights take since.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        from .terminal import plain

        return plain(self.to_dict())


@dataclass(frozen=True, kw_only=True)
class Report(Drawn):
    """The outcome of tuning, or of profiling alone.

    Args:
        model: model name.
        parameters: number of parameters, tied ones once.
        hardware: the machine the figures come from.
        workload: what was run, in words ("16 prompts of 64 tokens, 64 new tokens each, batch 1").
        before: profile of the original.
        diagnoses_before: what limits each phase of the original.
        verdict: one sentence: what was committed, or why the original was kept.
        doubt: why the outcome is not kept as a plan; None where it is.
        after: profile of the variant that serves; None where that is the original.
        diagnoses_after: what limits it now.
        transforms: what the plan applies, in order; empty where the original was kept.
        contributions: what each of them brings; empty where it is one, or none.
        trials: everything considered.
        quality, latency: the whole plan against the original, on held-out prompts; None where it did not come to that.
        policy, tier, objective, budget_s: what was asked for.
        seconds: time spent tuning.
        elsewhere: share of the CPU time that others took meanwhile; None where nobody knows.
        break_even_tokens: tokens to generate until the tuning time is won back.
        served: calls served by the plan since.
        bypassed: calls that went to the original since, by reason.
        bytes_after_release: what the weights take since the original was let go; None while it is kept.
        created: ISO 8601, UTC.
        ncu: what Nsight Compute counted, by phase.
    """

    model: str
    parameters: int
    hardware: Hardware
    workload: str
    before: Profile
    diagnoses_before: Mapping[Phase, Diagnosis]
    verdict: str
    doubt: str | None = None
    after: Profile | None = None
    diagnoses_after: Mapping[Phase, Diagnosis] = field(default_factory=dict)
    transforms: tuple[Transform, ...] = ()
    contributions: tuple[Contribution, ...] = ()
    trials: tuple[Trial, ...] = ()
    quality: Quality | None = None
    latency: Latency | None = None
    policy: str | None = None
    tier: str | None = None
    objective: str | None = None
    budget_s: float | None = None
    seconds: float | None = None
    elsewhere: float | None = None
    break_even_tokens: float | None = None
    served: int = 0
    bypassed: Mapping[str, int] = field(default_factory=dict)
    bytes_after_release: int | None = None
    created: str = ""
    ncu: Mapping[Phase, Reading] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        from .record import record

        return record(self)

    def with_calls(self, served: int, bypassed: Mapping[str, int]) -> Self:
        return replace(self, served=served, bypassed=dict(bypassed))

    def without_original(self, weights_bytes: int | None) -> Self:
        return replace(self, bytes_after_release=weights_bytes)


@dataclass(frozen=True)
class Recorded(Drawn):
    """A report read back from a plan or a report.json.

    Args:
        record: what `Report.to_dict` gave then.
    """

    record: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.record)

    def with_calls(self, served: int, bypassed: Mapping[str, int]) -> Self:
        return replace(self, record=dict(self.record) | {"served": served, "bypassed": dict(bypassed)})

    def without_original(self, weights_bytes: int | None) -> Self:
        return replace(self, record=dict(self.record) | {"bytes_after_release": weights_bytes})

    def reverified(
        self,
        *,
        verdict: str,
        seconds: float,
        latency: Latency | None = None,
        quality: Quality | None = None,
        elsewhere: float | None = None,
    ) -> Self:
        """This report with what a replay measured anew; profiles and trials stay those of the tuning."""
        from .record import reverify

        return replace(self, record=reverify(self.record, verdict, seconds, latency, quality, elsewhere))


def read(record: Mapping[str, Any]) -> Recorded:
    """A report from a record of unknown origin.

    Raises:
        PlanError: it is not a record that this version can show.
    """
    recorded = Recorded(record)
    try:
        str(recorded)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise PlanError(f"the report in it cannot be shown ({type(error).__name__}: {error})") from error
    return recorded
