"""What a variant costs: prefill and decode measured apart.

`measure` is the door. Behind it: `timing` (requests as they are served), `tracing`, `spans` and `operators` (where the
time goes, under torch's profiler), `scaling` (batch sizes and context lengths); on a GPU also `recording`, `timeline`
and `phases` (what its trace says) and `observing` (its own clock and counters). What is measured is a `diagnose.costs`.
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
        variant: what to measure; it is left as it is.
        workload: prompts; their median length and the first batch size are measured.
        hardware: measured peaks, for the operator table's verdicts.
        budget_s: seconds to spend. The first request is a warm-up that always runs, and so do one sample and one trace.
        scaling: also measure batch scaling and context growth, with what is left of the budget.
        progress: told the name of each step.
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
    """A profile with batch scaling and context growth; the arguments are those of `measure`."""
    from .budget import Budget
    from .survey import grown

    batches, contexts = grown(variant, workload, Budget(budget_s, progress))
    return replace(profile, batch_scaling=batches, context_growth=contexts)
