"""Experiments: a control against candidates, measured offline, beside live traffic, or on a share of it.

given -> arms                     what is compared
offline -> verdicts               how it is measured, and what follows
results -> pareto, sections       what came of it, and how it is shown
store -> database                 what is kept of it, so that it survives a restart
live -> replays -> shadow         candidates beside live traffic
live -> ramp -> split             a candidate on a share of live traffic
sequential -> guardrails          tests that may be looked at any time, and limits judged with them
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ExperimentError, WorkloadError
from ...tune.policy import nearest
from ...validate.limits import Limits
from ...validate.tiers import TIERS
from ...workload import METRICS, Metric
from . import given
from .arms import Arm, Bench
from .guardrails import Guardrail
from .results import Outcome, Result
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...validate.timing import Clock
    from .shadow import Shadow
    from .split import Split

log = logging.getLogger("autotune")

__all__ = ["Arm", "Experiment", "Guardrail", "Outcome", "Result", "Store"]


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
        workload: prompts as `wrap` takes them, a .txt or .jsonl file of them, or a Workload.
        new_tokens, batch_sizes: tokens generated per prompt, and sequences generated together; default the Workload's
            own, or 64 and 1. Every batch size is a bucket with a verdict of its own.
        tier: quality tier that a candidate has to hold.
        objective: what has to gain: "end_to_end", "ttft" or "tpot".
        limits: least gain, and what must not get worse, in every bucket of the workload.
        store: where it is kept: a Store, the path of its file, or None for the one in the user's cache directory.

    Raises:
        ExperimentError: a name, candidate, tier or objective that does not exist; names the nearest spelling.
    """

    def __init__(
        self,
        name: str,
        *,
        control: Any = None,
        candidates: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        workload: Any = None,
        new_tokens: int | None = None,
        batch_sizes: Iterable[int] | None = None,
        tier: str = "strict",
        objective: Metric = "end_to_end",
        limits: Limits | None = None,
        store: Store | str | Path | None = None,
    ) -> None:
        self.name = given.checked_name(name)
        self.control, self.candidates = given.parse(control, candidates)
        self.tokenizer, self.tier, self.objective = tokenizer, _one_of("tier", tier, TIERS), objective
        _one_of("objective", objective, METRICS)
        self.limits = limits or Limits()
        self._given, self._shape, self._store = workload, (new_tokens, batch_sizes), store
        self._bench: Bench | None = None
        self._arms: tuple[Arm, ...] | None = None

    @property
    def store(self) -> Store:
        """Where observations, verdicts and events are kept; opened when first asked for."""
        if not isinstance(self._store, Store):
            self._store = Store(self._store)
        return self._store

    def bench(self, notify: Callable[[str], None] | None = None) -> Bench:
        """The control's model, its tokenizer and its work; the model is loaded when first asked for.

        Args:
            notify: told each step in a sentence.

        Raises:
            UnsupportedModelError: the control's checkpoint cannot be loaded.
            WorkloadError: there are no prompts, or they cannot be used.
        """
        if self._bench is None:
            self._bench = self._prepared(notify or log.info)
        return self._bench

    def arms(self, notify: Callable[[str], None] | None = None) -> tuple[Arm, ...]:
        """The control and the candidates, built when first asked for; one that cannot be built says so in `problem`.

        Args:
            notify: told each step in a sentence.

        Raises:
            AutotuneError: the control itself cannot be built, or there are no prompts.
        """
        if self._arms is None:
            bench = self.bench(notify)
            self._arms = (bench.control(self.control), *map(bench.candidate, self.candidates.values()))
        return self._arms

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
        from .offline import run

        return run(self, budget_s=budget_s, pairs=pairs, notify=progress or log.info, clock=clock)

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
        from .shadow import Shadow

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
        from .split import Split

        return Split(self, model, **options)

    def _prepared(self, notify: Callable[[str], None]) -> Bench:
        from ... import workload

        model, tokenizer = self.control.value, self.tokenizer
        if self.control.kind == "checkpoint":
            from ...model.load import load

            notify(f"loading {model}")
            model, found = load(model)
            tokenizer = tokenizer or found
        elif self.control.kind == "variant":
            model = model.original
        if self._given is None:
            raise WorkloadError("there is no workload; expected prompts or a file of them: workload=[...]")
        new_tokens, batches = self._shape
        work = workload.read(self._given, tokenizer=tokenizer, model=model, new_tokens=new_tokens, batch_sizes=batches)
        return Bench(model, tokenizer, work, notify)


def _one_of(what: str, value: str, known: Any) -> str:
    if value not in known:
        raise ExperimentError(f"there is no {what} {value!r}{nearest(value, known)}; choose one of {', '.join(known)}")
    return value
