"""What came of an experiment, as values."""

from __future__ import annotations

from dataclasses import dataclass

from ...validate import Latency, Quality, Speedup, Verdict


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
class Outcomes:
    """What became of an experiment.

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
