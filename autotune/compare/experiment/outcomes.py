"""The outcome of an experiment, as values."""

from __future__ import annotations

from dataclasses import dataclass

from ...validate import Latency, Quality, Speedup, Verdict


@dataclass(frozen=True)
class Cell:
    """One candidate in one bucket of the workload.

    Args:
        bucket: "b1/p64/n32".
        verdict, reason: the verdict on this bucket alone.
        ttft, tpot, end_to_end: speed-ups over the control.
        tokens_per_s, control_tokens_per_s: medians of the whole batch's new tokens per second of a request.
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
    """One arm and its outcome.

    Args:
        name, description, fingerprint: those of the arm.
        verdict: PASS, FAIL, INCONCLUSIVE or ERROR; a control that could be measured is PASS.
        reason: the sentence that decided.
        quality: compared with the control; None if it was not judged.
        latency: compared with the control over all buckets; None for the control, and if it was not timed.
        cells: results by bucket.
        p_value: chance of a gain at least this clear if there were none (`verdicts.chance`); NaN if not measured.
        stored_bytes: bytes of its serving weights, including those shared with the control.
        peak_bytes: `stored_bytes` plus what the largest request adds: measured on a GPU, a full KV cache on a CPU.
        notes: facts that a reader should know.
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
    """The outcome of an experiment.

    Args:
        name, version: those of the experiment; another arm or workload under the same name is another version.
        verdict: PASS if any candidate passes, ERROR if all have errors, INCONCLUSIVE if any is inconclusive, else FAIL.
        reason: why, in one sentence.
        tier, objective: what was asked for.
        noise: the control's apparent gain over itself, a fraction.
        outcomes: outcomes of the arms, the control's first.
        created: ISO 8601, UTC.
        seconds: time that this run took.
        warnings: problems noticed while measuring.
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
