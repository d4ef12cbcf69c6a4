"""Measure what a variant costs, separately for prefill and decode.

`measure` is the entry point. It uses `timing` (requests as they are served), `tracing`, `spans` and `operators` (time
by operator, under torch's profiler) and `scaling` (batch sizes and context lengths). On a GPU, it also uses
`recording`, `timeline` and `phases` (the GPU's trace) and `observing` (the GPU's clock and counters). The results are
values of `diagnose.costs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..diagnose.costs import Profile

if TYPE_CHECKING:
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Workload


def measure(
    variant: Variant,
    workload: Workload,
    hardware: Hardware,
    *,
    budget_s: float = 20.0,
    scaling: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Profile:
    """Profile a variant on the workload's median prompt, through the path that will serve it.

    Args:
        variant: the variant to measure; it is not changed.
        workload: prompts; their median length and the first batch size are measured.
        hardware: measured peaks, for the operator table's verdicts.
        budget_s: seconds to spend. A warm-up request, one sample and one trace always run.
        scaling: also measure batch scaling and context growth, with the rest of the budget.
        progress: called with the name of each step.
    """
    from .survey import survey

    return survey(variant, workload, hardware, budget_s=budget_s, scaling=scaling, progress=progress)


def grow(
    profile: Profile,
    variant: Variant,
    workload: Workload,
    *,
    budget_s: float,
    progress: Callable[[str], None] | None = None,
) -> Profile:
    """Add batch scaling and context growth to a profile. The arguments are those of `measure`."""
    from .budget import Budget
    from .survey import grown

    batches, contexts = grown(variant, workload, Budget(budget_s, progress))
    return replace(profile, batch_scaling=batches, context_growth=contexts)
