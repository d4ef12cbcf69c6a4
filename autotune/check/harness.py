"""Tasks of the lm-evaluation-harness, where it is installed; autotune installs and downloads nothing of it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import MeasurementError
from ..variant import serving
from .tasks import Suite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..variant import Variant

METRICS = ("acc", "exact_match", "em")  # per sample 0 or 1, the first that a task has
PREFIX = "lm-eval:"


def unavailable() -> str | None:
    """Why the harness cannot be used, or None."""
    if importlib.util.find_spec("lm_eval") is None:
        return "lm-evaluation-harness is not installed: pip install lm-eval"
    return None


def answer(variant: Variant, task: str, tokenizer: PreTrainedTokenizerBase | None, limit: int | None = None) -> Suite:
    """A task's outcomes on a variant as it serves.

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
    except Exception as error:  # the harness raises whatever its tasks' own code does
        raise MeasurementError(f"lm-evaluation-harness cannot run {task}: {type(error).__name__}: {error}") from error
    return outcomes(task, found)


def outcomes(task: str, found: Mapping[str, Any]) -> Suite:
    """Outcome by sample from what the harness returned. Pure.

    Raises:
        MeasurementError: there is none that is right or wrong.
    """
    samples = [sample for rows in found.get("samples", {}).values() for sample in rows]
    metric = next((name for name in METRICS if samples and name in samples[0]), None)
    if metric is None:
        raise MeasurementError(f"{task} has no outcome per sample; expected one of {', '.join(METRICS)}")
    right = {str(sample["doc_id"]): bool(sample[metric]) for sample in samples}
    return Suite(f"{PREFIX}{task}", (), tuple(right), tuple(right.values()))
