"""Experiments: compare candidates with a control, offline, beside live traffic, or on a share of it.

given -> arms -> setup            what is compared
offline -> verdicts               how it is measured and judged
outcomes -> pareto, sections      the result, and how it is shown
store -> database                 what is saved, so that it survives a restart
live -> replays -> shadow         candidates beside live traffic
live -> ramp -> split             a candidate on a share of live traffic
sequential -> guardrails          tests that are valid at any look, and limits judged with them
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import offline
from .arms import Arm
from .guardrails import Guardrail
from .results import Outcome, Result
from .setup import Setup, log
from .shadow import Shadow
from .split import Split
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...validate.timing import Clock

__all__ = ["Arm", "Experiment", "Guardrail", "Outcome", "Result", "Store"]


class Experiment(Setup):
    __doc__ = Setup.__doc__

    def run(
        self,
        *,
        budget_s: float = 600.0,
        pairs: int = 25,
        progress: Callable[[str], None] | None = None,
        clock: Clock = time.perf_counter,
    ) -> Result:
        """Measure every arm on the workload, now and on this machine, and judge.

        Observations are saved as they are made. If a run is interrupted, the next one continues where it ended.

        Args:
            budget_s: seconds for comparing, including quality; a policy is tuned before that, within its own budget.
            pairs: most timed pairs per bucket and candidate. Fewer than 6 cannot show a gain of one candidate, fewer
                than 7 one of two or three candidates.
            progress: called with a sentence for each step.
            clock: returns monotonic seconds.

        Raises:
            MeasurementError: the control itself could not be measured.
            AutotuneError: the control or the workload cannot be used.
        """
        return offline.run(self, budget_s=budget_s, pairs=pairs, notify=progress or log.info, clock=clock)

    def shadow(self, model: PreTrainedModel, **options: Any) -> Shadow:
        """Run the candidates beside live traffic: `model` answers every call; a sample is replayed on them afterwards.

        Args:
            model: the live model, wrapped or not.
            options: share, queue, deadline_s, budget, budget_s, seed; see `shadow.Shadow`.

        Returns:
            A context manager, or call its `.start()` and `.stop()`. It has a `.status`.

        Raises:
            ExperimentError: a candidate cannot be run beside the live model, or a number makes no sense.
        """
        return Shadow(self, model, **options)

    def split(self, model: PreTrainedModel, **options: Any) -> Split:
        """Give one candidate a share of live traffic, by a stable key. Sequential tests ramp it up or roll it back.

        Args:
            model: the live model, wrapped or not, which is the control.
            options: candidate, ramp, guardrails, step_requests, key; see `split.Split`.

        Returns:
            A context manager, or call its `.start()` and `.stop()`. It has a `.status`, `.key(user)` and `.resume()`.

        Raises:
            ExperimentError: the candidate cannot answer the live model's calls, or a setting makes no sense.
        """
        return Split(self, model, **options)
