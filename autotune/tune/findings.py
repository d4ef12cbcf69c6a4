"""Values that tuning, or profiling alone, measured, tried and decided; a `Report` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..diagnose.costs import Profile
from ..diagnose.diagnosis import Diagnosis
from ..machine.hardware import Hardware
from ..profile.ncu import NcuExport
from ..runtime.variant import Transform
from ..validate import Latency, Quality
from ..workload import Phase
from .contributions import Contribution
from .plan import Trial
from .sharing import Sharing


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The outcome of tuning, or of profiling alone.

    Args:
        model: model name.
        parameters: number of parameters; tied ones count once.
        hardware: the machine that the figures come from.
        workload: the workload in words ("16 prompts of 64 tokens, 64 new tokens each, batch 1").
        before: profile of the original.
        diagnoses_before: what limits each phase of the original.
        verdict: one sentence: what was committed, or why the original was kept.
        doubt: why the outcome is not saved as a plan; None if it is.
        after: profile of the variant that serves; None if that is the original.
        diagnoses_after: what limits each phase of that variant.
        transforms: transforms that the plan applies, in order; empty if the original was kept.
        contributions: what each transform contributes; empty if there are fewer than two.
        sharing: what decoding several callers together brings; None if the policy does not ask.
        trials: every candidate that was considered.
        quality, latency: the whole plan compared with the original, on held-out prompts; None if not measured.
        policy, tier, objective, budget_s: what was asked for.
        seconds: time spent tuning.
        elsewhere: share of the CPU time that other processes took meanwhile; None if unknown.
        break_even_tokens: number of tokens to generate until the time saved equals the tuning time.
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
    sharing: Sharing | None = None
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
    created: str = ""
    ncu: Mapping[Phase, NcuExport] = field(default_factory=dict)
