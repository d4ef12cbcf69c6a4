"""Experiments: a control against candidates, measured offline, beside live traffic, or on a share of it.

arms -> offline -> results        what is compared, how it is measured, what came of it
store                             what is kept of it, so that it survives a restart
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import workload as workloads
from ..errors import ExperimentError
from ..policy import Limits, nearest
from ..validate.ratios import METRICS, Metric
from ..validate.tiers import TIERS
from ..workload import Workload
from . import arms
from .arms import Arm
from .results import Outcome, Result
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..validate.timing import Clock

__all__ = ["Arm", "Experiment", "Outcome", "Result", "Store"]


class Experiment:
    """A control and what wants to replace it.

    Args:
        name: what it is kept under; letters, digits, ".", "_" and "-".
        control: the model as it is, the path of a checkpoint, or anything that a candidate may be and that brings its
            model along (a `Variant`). Default: the model that the candidates that are Variants were made of.
        candidates: by name: a Variant; a transform or a list of them; a Plan or the path of its JSON file; the name of
            a policy (or its .toml file), for which the model is tuned first; or another model, loaded or the path of
            its checkpoint. Quality is compared where the tokenizer is the same, and latency alone where it is not.
        tokenizer: needed for prompts given as text; also provides natural text to judge quality on.
        workload: prompts as `wrap` takes them, a file of them, or a Workload.
        tier: quality tier that a candidate has to hold.
        objective: what has to gain: "end_to_end", "ttft" or "tpot".
        limits: least gain, and what must not get worse, in every bucket of the workload.
        store: where it is kept: a Store, the path of its file, or None for the one in the user's cache directory.

    Raises:
        ExperimentError: a name, candidate, tier or objective that does not exist; names the nearest spelling.
        WorkloadError: the prompts cannot be used.
    """

    def __init__(
        self,
        name: str,
        *,
        control: Any = None,
        candidates: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        workload: Any = None,
        tier: str = "strict",
        objective: Metric = "end_to_end",
        limits: Limits | None = None,
        store: Store | str | Path | None = None,
    ) -> None:
        self.name = arms.checked_name(name)
        self.control, self.candidates = arms.parse(control, candidates)
        self.tokenizer, self.tier, self.objective = tokenizer, _one_of("tier", tier, TIERS), objective
        _one_of("objective", objective, METRICS)
        self.limits = limits or Limits()
        self._given, self._store = workload, store
        self._arms: tuple[Arm, ...] | None = None

    @property
    def store(self) -> Store:
        """Where observations, verdicts and events are kept; opened when first asked for."""
        if not isinstance(self._store, Store):
            self._store = Store(self._store)
        return self._store

    def arms(self, notify: Callable[[str], None] | None = None) -> tuple[Arm, ...]:
        """The control and the candidates, built when first asked for; one that cannot be built says so in `problem`.

        Args:
            notify: told each step in a sentence.

        Raises:
            ExperimentError: the control itself cannot be built.
        """
        if self._arms is None:
            self._arms = arms.build(self, notify or (lambda step: None))
        return self._arms

    def workload(self) -> Workload:
        """The prompts, checked against the control's model.

        Raises:
            WorkloadError: there are none, or they cannot be used.
        """
        raise NotImplementedError

    def run(
        self,
        *,
        budget_s: float = 600.0,
        pairs: int = 25,
        progress: Callable[[str], None] | None = None,
        clock: Clock | None = None,
    ) -> Result:
        """Measure every arm on the workload, now and here, and judge.

        Args:
            budget_s: seconds for all of it; tuning for policies and loading come first and count.
            pairs: timed pairs per bucket and candidate, at most.
            progress: told each step in a sentence.
            clock: monotonic seconds; default time.perf_counter.

        Raises:
            MeasurementError: the control itself could not be measured.
        """
        raise NotImplementedError


def _one_of(what: str, value: str, known: Any) -> str:
    if value not in known:
        raise ExperimentError(f"there is no {what} {value!r}{nearest(value, known)}; choose one of {', '.join(known)}")
    return value
