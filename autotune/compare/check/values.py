"""The result of a check, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...report.exit_codes import OF_VERDICT
from ...validate import Quality, Verdict
from .localise import Localised
from .tasks import Flips

EXIT_CODES = {verdict: int(OF_VERDICT[verdict.value]) for verdict in Verdict}
GRAVEST = (Verdict.FAIL, Verdict.ERROR, Verdict.INCONCLUSIVE, Verdict.PASS)


@dataclass(frozen=True)
class Metric:
    """One figure against its limit.

    Args:
        name: "mean KLD", "latency tpot b1/p64/n32", ...
        verdict: PASS, FAIL, INCONCLUSIVE or ERROR.
        reason: one sentence with numbers.
        value: the figure now; NaN if it is not a number.
        bound: the 95 % bound that was judged; NaN if the value itself was judged.
        limit: the figure's upper limit; NaN if there is none.
        recorded: the same figure of the baseline; NaN if it has none.
    """

    name: str
    verdict: Verdict
    reason: str
    value: float = float("nan")
    bound: float = float("nan")
    limit: float = float("nan")
    recorded: float = float("nan")


@dataclass(frozen=True)
class Checked:
    """The result of a check.

    Args:
        metrics: every figure with its verdict.
        quality: the full quality verdict.
        localised: where the difference is; None if quality passed.
        flips: changed outcomes of labelled tasks, by suite.
        tier: quality tier.
        model, baseline: their names.
        environment: machine and libraries of the recording and of this check, by "recorded" and "here".
        created: ISO 8601, UTC.
    """

    metrics: tuple[Metric, ...]
    quality: Quality
    tier: str
    model: str
    baseline: str
    localised: Localised | None = None
    flips: Mapping[str, Flips] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""

    @property
    def verdict(self) -> Verdict:
        """The gravest verdict of all metrics, in the order FAIL, ERROR, INCONCLUSIVE, PASS."""
        return min((metric.verdict for metric in self.metrics), key=GRAVEST.index, default=Verdict.INCONCLUSIVE)

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regression, 2 inconclusive, 3 could not measure."""
        return EXIT_CODES[self.verdict]

    @property
    def reason(self) -> str:
        """Why the check has this verdict, and where the difference is, in a sentence."""
        grave = [metric for metric in self.metrics if metric.verdict is self.verdict]
        if self.verdict is Verdict.PASS or not grave:
            return f"all {len(self.metrics)} metrics are within tier {self.tier} and the limits"
        more = f" (and {len(grave) - 1} more)" if len(grave) > 1 else ""
        where = f"; {self.localised.summary}" if self.localised and self.localised.summary else ""
        return f"{grave[0].name}: {grave[0].reason}{more}{where}"
