"""The outcome of a search: the verdict in a sentence, whether to save it, whether anything was tried. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..machine.busy import is_noticeable
from ..runtime.variant import Transform
from ..validate import Latency, Quality, Verdict
from .plan import Trial, TrialOutcome

UNTRIED = frozenset({TrialOutcome.ERROR, TrialOutcome.BLOCKED, TrialOutcome.UNREACHED})  # wanted, but not judged
UNWANTED = frozenset({TrialOutcome.SKIPPED, TrialOutcome.UNAVAILABLE})
MOST_CAUSES, MOST_NAMES = 3, 4  # most causes and names in a verdict; the report lists every candidate
SPEED_OPEN = "the winner's speed is open"
LONGEST_CAUSE = 160  # most characters of a cause in a verdict; a compiler's message may be longer


@dataclass(frozen=True)
class Conclusion:
    """A search and the confirmation of its winner.

    Args:
        trials: every candidate that was considered.
        winner: the transforms that the search accepted; empty if there were none.
        failure: the failure of the workload's largest request with the winner, or None.
        quality: the winner's quality on held-out prompts; None if it was not judged.
        latency: the winner's latency on held-out prompts; None if it was not timed.
        elsewhere: share of the CPU time that other processes took meanwhile; None if unknown.
    """

    trials: tuple[Trial, ...]
    winner: tuple[Transform, ...] = ()
    failure: str | None = None
    quality: Quality | None = None
    latency: Latency | None = None
    elsewhere: float | None = None

    @property
    def is_committed(self) -> bool:
        return self.latency is not None and self.latency.verdict is Verdict.PASS

    @property
    def verdict(self) -> str:
        """The outcome in a sentence with numbers. If the original is kept, untried candidates come first."""
        if self.is_committed:
            return f"{self._gain()}{self._footnote()}"
        reason = self._disproof() if self.winner else _not_better(self.trials)
        if not untried(self.trials):
            return f"kept the original: {reason}"
        return "; ".join(filter(None, (f"kept the original, but {not_tried(self.trials)}", reason)))

    @property
    def doubt(self) -> str | None:
        """Why "keep the original" must not be saved as a plan, or None. Another search might have another outcome."""
        if self.is_committed:
            return None
        return "; ".join(filter(None, (doubts(self.trials), self._unproven(), self._disturbed()))) or None

    @property
    def is_noisy(self) -> bool:
        """Whether the original was kept because a gain could not be told from noise; at a quieter time one may be."""
        if self.is_committed:
            return False
        drowned = any(trial.outcome is TrialOutcome.INCONCLUSIVE and trial.latency is not None for trial in self.trials)
        return drowned or self._unproven() == SPEED_OPEN or self._disturbed() != ""

    def _gain(self) -> str:
        assert self.latency is not None  # noqa: S101 - it is committed; for the type checker
        e, parts = self.latency.end_to_end, {"decode": self.latency.tpot, "prefill": self.latency.ttft}
        known = [(name, s) for name, s in parts.items() if not math.isnan(s.ratio)]  # one new token is not decoded
        told = "".join(f", {name} {s.ratio:.2f}x ({s.low:.2f} to {s.high:.2f})" for name, s in known)
        interval = f"(95 % interval {e.low:.2f} to {e.high:.2f})"
        return f"committed {self._names()}: requests {e.ratio:.2f}x as fast {interval}{told}"

    def _footnote(self) -> str:
        """Name the candidates that raised or were blocked, if any. Those that a spent budget left out are not named."""
        failed = [t for t in self.trials if t.outcome in (TrialOutcome.ERROR, TrialOutcome.BLOCKED)]
        if not failed:
            return ""
        return f"; {len(failed)} of {len(wanted(self.trials))} candidates could not be tried ({_names(failed)})"

    def _disproof(self) -> str:
        """Why the winner does not serve."""
        names, quality, latency = self._names(), self.quality, self.latency
        if self.failure is not None:
            return f"with {names} {self.failure}"
        if latency is not None:
            return f"on held-out prompts {names} did not confirm its speed: {latency.reason}"
        if quality is None:
            return f"{names} could not be confirmed"
        if quality.verdict is Verdict.FAIL:
            return f"on held-out prompts {names} did not keep the quality: {quality.reason}"
        return f"the quality of {names} could not be confirmed on held-out prompts: {quality.reason}"

    def _unproven(self) -> str:
        """What the confirmation left open; empty if it proved the winner worse or not faster."""
        quality, latency = self.quality, self.latency
        if not self.winner:
            return ""
        if self.failure is not None or (quality is None and latency is None):
            return "the winner failed before it was confirmed"
        if latency is not None:
            return "" if latency.verdict is Verdict.FAIL and not latency.drowned else SPEED_OPEN
        return "" if quality is not None and quality.verdict is Verdict.FAIL else "the winner's quality is open"

    def _disturbed(self) -> str:
        """How many candidates were found no faster while other processes were busy; empty if none."""
        slow = sum(trial.outcome is TrialOutcome.REJECTED and trial.latency is not None for trial in self.trials)
        if not slow or self.elsewhere is None or not is_noticeable(self.elsewhere):
            return ""
        beside = f"while others took {self.elsewhere:.0%} of the CPU time".replace("%", " %")
        return f"{slow} of {len(wanted(self.trials))} candidates came out no faster {beside}"

    def _names(self) -> str:
        return " + ".join(map(str, self.winner))


def wanted(trials: Iterable[Trial]) -> list[Trial]:
    """The candidates that were called for and available."""
    return [trial for trial in trials if trial.outcome not in UNWANTED]


def untried(trials: Iterable[Trial]) -> list[Trial]:
    """The wanted candidates that were not judged: they raised, were blocked, or the budget was spent."""
    return [trial for trial in trials if trial.outcome in UNTRIED]


def is_fruitless(trials: Sequence[Trial]) -> bool:
    """Whether candidates were wanted, but none could be tried."""
    return 0 < len(untried(trials)) == len(wanted(trials))


def doubts(trials: Sequence[Trial]) -> str | None:
    """Why these trials do not show that there is nothing better than the original, or None."""
    counts = {
        "could not be tried": len(untried(trials)),
        "came out inconclusive": sum(trial.outcome is TrialOutcome.INCONCLUSIVE for trial in trials),
    }
    found = [f"{count} of {len(wanted(trials))} candidates {what}" for what, count in counts.items() if count]
    return "; ".join(found) or None


def not_tried(trials: Sequence[Trial]) -> str:
    """How many candidates could not be tried, and why: the most frequent cause first, each with its candidates."""
    by_cause: dict[str, list[Trial]] = {}
    for trial in untried(trials):
        by_cause.setdefault(cause(trial), []).append(trial)
    causes = sorted(by_cause.items(), key=lambda item: -len(item[1]))  # stable: equally frequent causes stay in order
    told = [f"{why} ({_names(those)})" for why, those in causes[:MOST_CAUSES]]
    if others := sum(len(those) for _, those in causes[MOST_CAUSES:]):
        told.append(f"{others} more for other reasons")
    return f"{len(untried(trials))} of {len(wanted(trials))} candidates could not be tried: {'; '.join(told)}"


def cause(trial: Trial) -> str:
    """A trial's reason on one line, without the candidate's own name, so that equal causes read alike."""
    text = " ".join(trial.reason.removeprefix(f"{trial.transform}: ").split()).rstrip(".")
    return text if len(text) <= LONGEST_CAUSE else f"{text[: LONGEST_CAUSE - 3]}..."


def _not_better(trials: Sequence[Trial]) -> str:
    """The outcome of the candidates that were judged; empty if none was and the untried ones explain why."""
    judged = [trial for trial in wanted(trials) if trial.outcome not in UNTRIED]
    if not judged:
        return "" if untried(trials) else "no candidate is both called for and available on this model and machine"
    open_ = sum(trial.outcome is TrialOutcome.INCONCLUSIVE for trial in judged)
    told = (
        f"none of {len(judged)} candidates tried proved" if len(judged) > 1 else "the one candidate tried did not prove"
    )
    return f"{told} both faster and no worse{f' ({open_} inconclusive)' if open_ else ''}"


def _names(trials: Iterable[Trial]) -> str:
    """Names of the trials' transforms, each once; only the first ones if there are many."""
    names = list(dict.fromkeys(transform.name for trial in trials for transform in trial.transforms))
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES} more"
