"""Guardrails: limits on how much worse a candidate may be, judged on the figures so far. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ExperimentError
from ...validate import Verdict
from . import sequential
from .sequential import EVERYTHING, START_SKEWED, Interval, Moments

if TYPE_CHECKING:
    import torch

Kind = Literal["rate", "ratio", "mean"]
# Standard deviation of log times, assumed before any were measured: between requests, whose prompts and answers differ
# in length, and between pairs.
UNSEEN_STD, UNSEEN_PAIRED_STD = 0.5, 0.1


@dataclass(frozen=True)
class Guardrail:
    """One limit.

    Args:
        name: "errors", "ttft", "tpot", or a name for the user's metric.
        kind: "rate" (share of requests for which the metric is true), "ratio" (of positive values, such as times or
            lengths; geometric means are compared), or "mean" (of any values).
        limit: how much worse the candidate may be: a difference for a rate or a mean, a fraction for a ratio.
        measure: computes the user's metric of one answer from the prompt's ids [B, P] and the new ids [B, N]. If it
            returns None, the answer is left out. "errors", "ttft" and "tpot" are measured without it.
        worse: the direction that is worse.

    Raises:
        ExperimentError: a limit or kind makes no sense.
    """

    name: str
    kind: Kind
    limit: float
    measure: Callable[[torch.Tensor, torch.Tensor], float | bool | None] | None = None
    worse: Literal["higher", "lower"] = "higher"

    def __post_init__(self) -> None:
        if self.kind not in ("rate", "ratio", "mean") or self.worse not in ("higher", "lower"):
            raise ExperimentError(
                f"guardrail {self.name!r} has kind {self.kind!r} and worse {self.worse!r}; expected rate, ratio or "
                "mean, and higher or lower"
            )
        if not (math.isfinite(self.limit) and self.limit >= 0 and (self.kind != "rate" or self.limit < 1)):
            raise ExperimentError(
                f"guardrail {self.name!r} has the limit {self.limit}; expected 0 or more (a rate < 1)"
            )

    @property
    def bar(self) -> float:
        """The limit on the scale that `scale` returns."""
        return math.log1p(self.limit) if self.kind == "ratio" else self.limit

    def scale(self, raw: float | bool | None) -> float | None:
        """Convert a measurement to the value that is averaged; larger is worse. None if it is not usable."""
        if raw is None or not math.isfinite(raw):
            return None
        if self.kind == "rate":
            return float(bool(raw) is (self.worse == "higher"))
        if self.kind == "ratio" and raw <= 0:
            return None
        value = math.log(raw) if self.kind == "ratio" else float(raw)
        return value if self.worse == "higher" else -value


# Default limits: at most 2 % more failures than the control, and at most 10 % slower answers.
STANDARD = (
    Guardrail("errors", "rate", 0.02),
    Guardrail("ttft", "ratio", 0.10),
    Guardrail("tpot", "ratio", 0.10),
)

Figures = Mapping[str, Moments]  # guardrail name -> statistics of one arm


@dataclass(frozen=True)
class Finding:
    """A guardrail's result for a candidate.

    Args:
        name: name of the guardrail.
        verdict: FAIL: surely over the limit; PASS: surely within it; INCONCLUSIVE: neither yet.
        worse_by: how much worse the candidate is, on the guardrail's scale (logarithms for a ratio); NaN if unknown.
        interval: confidence sequence of `worse_by`, valid at any look.
        requests: number of the candidate's requests that were measured.
        text: the result in a sentence.
    """

    name: str
    verdict: Verdict
    worse_by: float
    interval: Interval
    requests: int
    text: str


def judge(guardrail: Guardrail, control: Moments | None, candidate: Moments, alpha: float) -> Finding:
    """Judge the figures against one limit.

    Args:
        guardrail: the limit.
        control: statistics of the control's requests; None if the candidate's figures are already differences of
            pairs, or failures that the control did not have.
        candidate: statistics of the candidate's requests.
        alpha: chance of ever giving a false FAIL, and of ever giving a false PASS.
    """
    if guardrail.kind == "rate":
        within = sequential.rate_interval(candidate.hits, candidate.n, alpha)
        interval = within if control is None else sequential.rate_difference(control, candidate, alpha)
    else:
        start = START_SKEWED if guardrail.kind == "mean" else sequential.START
        interval = (
            sequential.mean_interval(candidate, alpha, start)
            if control is None
            else sequential.mean_difference(control, candidate, alpha, start)
        )
    seen = candidate.n > 0 and (control is None or control.n > 0)
    by = candidate.mean - (control.mean if control else 0.0) if seen else math.nan
    if interval.low > guardrail.bar:
        verdict = Verdict.FAIL
    else:
        verdict = Verdict.PASS if interval.high <= guardrail.bar else Verdict.INCONCLUSIVE
    return Finding(guardrail.name, verdict, by, interval, candidate.n, _say(guardrail, by, interval, candidate.n))


def _say(guardrail: Guardrail, by: float, interval: Interval, requests: int) -> str:
    def figure(value: float) -> str:
        if math.isinf(value) or math.isnan(value):
            return "unknown" if math.isnan(value) else ("any" if value > 0 else "-any")
        if guardrail.kind == "mean":
            return f"{value:+.4g}"
        return f"{math.expm1(value) if guardrail.kind == 'ratio' else value:+.1%}"

    within = "not enough to say" if interval == EVERYTHING else f"[{figure(interval.low)}, {figure(interval.high)}]"
    return f"{guardrail.name} {figure(by)} {within}, limit {figure(guardrail.bar)}, {requests} requests"


def conclude(findings: Sequence[Finding]) -> tuple[Verdict, str]:
    """The verdict on all guardrails, and why: which failed, else which are open, else that all passed."""
    for wanted, lead in ((Verdict.FAIL, "over the limit: "), (Verdict.INCONCLUSIVE, "open: ")):
        if found := [f for f in findings if f.verdict is wanted]:
            return wanted, lead + "; ".join(f.text for f in found)
    return Verdict.PASS, "within every limit: " + "; ".join(f.text for f in findings)


def stated_bound(
    guardrail: Guardrail, alpha: float, *, std: float = math.nan, share: float | None = None, before: int = 0
) -> str:
    """State in a sentence the number of its requests in which a clearly worse candidate is caught.

    "Clearly worse" is a rate 10 points over the limit and a total failure, or a ratio or mean at twice the limit. The
    chance of having caught it by then is at least 95 %.

    Args:
        guardrail: the limit.
        alpha: as for `judge`.
        std: standard deviation of the values so far. NaN means not known yet; then `UNSEEN_STD` or `UNSEEN_PAIRED_STD`
            is assumed for a ratio, and nothing is stated for a mean.
        share: share of requests that the candidate gets, above 0; None if its values are compared with no control's.
        before: requests of the control that were measured before the candidate got all of them.
    """
    if share is not None and share >= 1 and not before:
        return f"{guardrail.name}: nothing is caught, because the control has served no request to compare with"
    control = sequential.KNOWN
    if share is not None:
        control = sequential.Control((1 - share) / share, before if share >= 1 else 0)
    if guardrail.kind == "rate":
        rate = min(1.0, guardrail.limit + 0.10)
        some = sequential.requests_to_see_rate(rate, guardrail.limit, alpha, control=control)
        every = sequential.requests_to_see_rate(1.0, guardrail.limit, alpha, control=control)
        within, whole = (n or f"over {sequential.MAX_RATE_REQUESTS}" for n in (some, every))
        return f"{guardrail.name}: a rate of {rate:.0%} is caught within {within} requests, of 100% within {whole}"
    if guardrail.kind == "mean" and math.isnan(std):
        return f"{guardrail.name}: its spread is not known yet"
    unseen = UNSEEN_PAIRED_STD if share is None else UNSEEN_STD
    known = float(f"{unseen if math.isnan(std) else std:.3g}")  # few different values, so that results are cached
    excess = math.log1p(2 * guardrail.limit) - guardrail.bar if guardrail.kind == "ratio" else guardrail.limit
    n = sequential.requests_to_see_mean(excess, known, alpha, control=control) if excess > 0 else None
    many = f"{max(n, START_SKEWED) if guardrail.kind == 'mean' else n}" if n else f"over {sequential.MAX_REQUESTS}"
    how = "assumed" if math.isnan(std) else "seen"
    effect = f"+{2 * guardrail.limit:.0%}" if guardrail.kind == "ratio" else f"+{2 * guardrail.limit:.4g}"
    return f"{guardrail.name}: {effect} is caught within {many} requests, at the {how} spread of {known:.3g}"


def add(figures: Figures, values: Mapping[str, float | None]) -> dict[str, Moments]:
    """Return the figures with one more request's values. A value of None is left out."""
    more = {name: figures.get(name, Moments()).add(v) for name, v in values.items() if v is not None}
    return {**figures, **more}


def checked(guardrails: Sequence[Any]) -> tuple[Guardrail, ...]:
    """Check that these are guardrails with different names.

    Raises:
        ExperimentError: they are not, or a user's metric has no `measure`.
    """
    for rail in guardrails:
        if not isinstance(rail, Guardrail):
            raise ExperimentError(f"a guardrail was expected, not {rail!r}: Guardrail(name, kind, limit, measure)")
        if rail.measure is None and rail.name not in ("errors", "ttft", "tpot"):
            raise ExperimentError(f"guardrail {rail.name!r} has no `measure`; only errors, ttft and tpot need none")
    names = [rail.name for rail in guardrails]
    if len(set(names)) != len(names) or not names:
        raise ExperimentError(f"guardrails need different names, and at least one; got {names}")
    return tuple(guardrails)
