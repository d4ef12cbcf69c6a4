"""What an experiment compares, on which workload, with which limits. Loads models and builds arms on first use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import workload as workloads
from ...errors import ExperimentError, WorkloadError, nearest
from ...model.load import load
from ...validate.limits import Limits
from ...validate.tiers import TIERS
from ...workload import METRICS, Metric, Workload
from . import given
from .arms import Arm, ArmBuilder
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("autotune")


class Setup:
    """A control and the candidates to replace it.

    Args:
        name: name under which the experiment is saved; letters, digits, ".", "_" and "-".
        control: the model as it is, the path of a checkpoint, or a `Variant`. Default: the model that the candidates
            that are Variants were made of.
        candidates: by name: a Variant; a transform or a list of them; a Plan or the path of its JSON file; the name of
            a policy (or its .toml file), for which the model is tuned first; or another model, loaded or the path of
            its checkpoint. Quality is compared only if the tokenizer is the same; otherwise only latency is.
        tokenizer: needed for prompts given as text; also provides natural text to judge quality on.
        workload: prompts as `wrap` takes them, a .txt or .jsonl file of them, or a Workload.
        new_tokens, batch_sizes: tokens generated per prompt, and sequences generated together; default: those of the
            Workload, or 64 and 1. Every batch size is a separate bucket with its own verdict.
        tier: quality tier that a candidate has to hold.
        objective: metric that has to gain: "end_to_end", "ttft" or "tpot".
        limits: least gain, and what must not get worse, in every bucket of the workload.
        store: where the experiment is saved: a Store, the path of its file, or None for the one in the user's cache
            directory.

    Raises:
        ExperimentError: a name, candidate, tier or objective does not exist; the message names the nearest spelling.
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
        self.tokenizer = tokenizer
        self.tier = _one_of("tier", tier, TIERS)
        self.objective = objective
        _one_of("objective", objective, METRICS)
        self.limits = limits or Limits()
        self.workload = workload
        self._shape = (new_tokens, tuple(batch_sizes) if isinstance(batch_sizes, Iterable) else batch_sizes)
        self._store = store
        self._bench: ArmBuilder | None = None
        self._arms: tuple[Arm, ...] | None = None

    @property
    def store(self) -> Store:
        """The store for observations, verdicts and events; opened on first use."""
        if not isinstance(self._store, Store):
            self._store = Store(self._store)
        return self._store

    def bench(self, notify: Callable[[str], None] | None = None) -> ArmBuilder:
        """The control's model, tokenizer and workload. Loads the model on first use.

        Args:
            notify: called with a sentence for each step.

        Raises:
            UnsupportedModelError: the control's checkpoint cannot be loaded.
            WorkloadError: there are no prompts, or they cannot be used.
        """
        if self._bench is None:
            self._bench = self._prepared(notify or log.info)
        return self._bench

    def arms(self, notify: Callable[[str], None] | None = None) -> tuple[Arm, ...]:
        """The control and the candidates, built on first use. A candidate that cannot be built has a `problem`.

        Args:
            notify: called with a sentence for each step.

        Raises:
            AutotuneError: the control itself cannot be built, or there are no prompts.
        """
        if self._arms is None:
            bench = self.bench(notify)
            self._arms = (bench.control(self.control), *map(bench.candidate, self.candidates.values()))
        return self._arms

    def _prepared(self, notify: Callable[[str], None]) -> ArmBuilder:
        model, tokenizer = self.control.value, self.tokenizer
        if self.control.kind == "checkpoint":
            notify(f"loading {model}")
            model, found = load(model)
            tokenizer = tokenizer or found
        elif self.control.kind == "variant":
            model = model.original
        if self.workload is None:
            raise WorkloadError("there is no workload; expected prompts or a file of them: workload=[...]")
        return ArmBuilder(model, tokenizer, self.work(model, tokenizer), notify)

    def work(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Workload:
        """Read the workload for a model.

        Raises:
            WorkloadError: the prompts cannot be used.
        """
        new_tokens, batches = self._shape
        return workloads.read(
            self.workload, tokenizer=tokenizer, model=model, new_tokens=new_tokens, batch_sizes=batches
        )


def _one_of(what: str, value: str, known: Any) -> str:
    if value not in known:
        raise ExperimentError(f"there is no {what} {value!r}{nearest(value, known)}; choose one of {', '.join(known)}")
    return value
