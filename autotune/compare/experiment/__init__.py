"""Experiments: a control against candidates, measured offline, beside live traffic, or on a share of it.

given -> arms -> setup            what is compared
offline -> verdicts               how it is measured, and what follows
outcomes -> pareto, sections      what came of it, and how it is shown
store -> database                 what is kept of it, so that it survives a restart
live -> replays -> shadow         candidates beside live traffic
live -> ramp -> split             a candidate on a share of live traffic
sequential -> guardrails          tests that may be looked at any time, and limits judged with them
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
        """Measure every arm on the workload, now and here, and judge.

        Observations are kept as they are made: interrupted, the next run goes on where this one ended.

        Args:
            budget_s: seconds for comparing, quality included; a policy is tuned before, within its own budget.
            pairs: timed pairs per bucket and candidate, at most; fewer than 8 cannot show a gain.
            progress: told each step in a sentence.
            clock: monotonic seconds.

        Raises:
            MeasurementError: the control itself could not be measured.
            AutotuneError: the control or the workload cannot be used.
        """
        return offline.run(self, budget_s=budget_s, pairs=pairs, notify=progress or log.info, clock=clock)

    def shadow(self, model: PreTrainedModel, **options: Any) -> Shadow:
        """The candidates beside live traffic: `model` answers every call, a sample is replayed on them afterwards.

        Args:
            model: the live model, wrapped or not.
            options: share, queue, deadline_s, budget, budget_s, seed; see `shadow.Shadow`.

        Returns:
            a context manager; or `.start()` and `.stop()` it. It has a `.status`.

        Raises:
            ExperimentError: a candidate cannot be run beside it, or a number makes no sense.
        """
        return Shadow(self, model, **options)

    def split(self, model: PreTrainedModel, **options: Any) -> Split:
        """A share of live traffic for one candidate, by a stable key, ramped up and rolled back by sequential tests.

        Args:
            model: the live model, wrapped or not: the control.
            options: candidate, ramp, guardrails, step_requests, key; see `split.Split`.

        Returns:
            a context manager; or `.start()` and `.stop()` it. It has a `.status`, `.key(user)` and `.resume()`.

        Raises:
            ExperimentError: the candidate cannot answer for it, or a setting makes no sense.
        """
        return Split(self, model, **options)
