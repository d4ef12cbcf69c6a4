"""Runs tasks of the lm-evaluation-harness if it is installed. autotune does not install or download any part of it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import MeasurementError, WorkloadError, nearest
from ...runtime.dispatch import serving
from .tasks import Suite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...runtime.variant import Variant

METRICS = ("acc", "exact_match", "em")  # metrics that are 0 or 1 per sample; the first that a task has is used
EXPECTED = f"0 or 1 as one of {', '.join(METRICS)}"
PREFIX = "lm-eval:"


def unavailable() -> str | None:
    """Why the harness cannot be used, or None."""
    if importlib.util.find_spec("lm_eval") is None:
        return "lm-evaluation-harness is not installed: pip install lm-eval"
    return None


def answer(variant: Variant, task: str, tokenizer: PreTrainedTokenizerBase | None, limit: int | None = None) -> Suite:
    """Run a task on a variant as it serves, and return its outcomes.

    Raises:
        MeasurementError: the harness is not installed, cannot run the task, or gives no outcome per sample.
    """
    if reason := unavailable():
        raise MeasurementError(reason)
    if tokenizer is None:
        raise MeasurementError(f"the task {task} of lm-evaluation-harness needs a tokenizer; the model has none")
    evaluator: Any = importlib.import_module("lm_eval")
    adapter: Any = importlib.import_module("lm_eval.models.huggingface")
    try:
        model = adapter.HFLM(pretrained=serving(variant), tokenizer=tokenizer)
        found: Any = evaluator.simple_evaluate(model=model, tasks=[task], limit=limit, log_samples=True)
    except Exception as error:  # the harness passes on any error of a task's code
        raise MeasurementError(f"lm-evaluation-harness cannot run {task}: {type(error).__name__}: {error}") from error
    return outcomes(task, found)


def require(tasks: Sequence[str]) -> None:
    """Refuse tasks that cannot be run, before the long work begins.

    Raises:
        MeasurementError: the harness is not installed.
        WorkloadError: the harness has no such task; the message names the nearest.
    """
    if not tasks:
        return
    if reason := unavailable():
        raise MeasurementError(reason)
    known = importlib.import_module("lm_eval.tasks").TaskManager().all_tasks
    for task in tasks:
        if task not in known:
            raise WorkloadError(f"lm-evaluation-harness has no task {task!r}{nearest(task, known)}")


def outcomes(task: str, found: Mapping[str, Any]) -> Suite:
    """Extract the outcomes from the harness's result, named "task/filter/document". Pure.

    Each task of a group numbers its documents from 0, and a task with several filters judges each document once per
    filter.

    Raises:
        MeasurementError: there is no outcome, or one is neither right nor wrong.
    """
    right: dict[str, bool] = {}
    for name, samples in found.get("samples", {}).items():
        for sample in samples:
            key = f"{name}/{sample.get('filter', 'none')}/{sample['doc_id']}"
            if key in right:
                raise MeasurementError(f"{task} has two outcomes for {key}; one was expected")
            right[key] = _outcome(name, sample)
    if not right:
        raise MeasurementError(f"{task} has no outcome per sample; expected {EXPECTED}")
    return Suite(f"{PREFIX}{task}", (), tuple(right), tuple(right.values()))


def _outcome(name: str, sample: Mapping[str, Any]) -> bool:
    metric = next((each for each in METRICS if each in sample), None)
    if metric is None:
        raise MeasurementError(f"{name} has no outcome per sample; expected {EXPECTED}")
    value = sample[metric]
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise MeasurementError(f"{name} has the {metric} {value!r} for a sample; expected {EXPECTED}")
    return bool(value)


def by_filter(suite: Suite) -> dict[str, tuple[int, ...]]:
    """Name -> positions of each filter's outcomes, which are compared separately.

    Two filters judge the same answers, so McNemar's test would count one change twice.
    """
    found: dict[str, list[int]] = {}
    for position, key in enumerate(suite.ids):
        found.setdefault(key.split("/")[-2] if "/" in key else "", []).append(position)
    named = {f"{suite.name} ({each})" if len(found) > 1 else suite.name: at for each, at in found.items()}
    return {name: tuple(positions) for name, positions in named.items()}
