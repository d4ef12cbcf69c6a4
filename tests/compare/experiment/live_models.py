"""Tiny candidates beside a live tiny model, and how they are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autotune.compare.experiment import Experiment
from autotune.compare.experiment.guardrails import STANDARD
from tests.models import tiny, token_prompts

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

ERRORS = STANDARD[0]
PROMPTS = [torch.tensor([prompt]) for prompt in token_prompts(8)]  # [1, 12] each
HALF = {"ramp": (0.5, 1.0), "guardrails": (ERRORS,), "step_requests": 10}


def other() -> PreTrainedModel:
    return tiny(seed=9)


def broken(after_tokens: int = 0, kind: type[Exception] = RuntimeError) -> PreTrainedModel:
    """A candidate that raises at its n-th forward."""
    model, calls = other(), [0]
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after_tokens:
            raise kind("no such kernel")
        return forward(*args, **kwargs)

    model.forward = run
    return model


def experiment(folder: Path, **candidates: Any) -> Experiment:
    return Experiment("trial", control=tiny(), candidates=candidates, store=folder / "experiments.sqlite")


def answer(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    result: torch.Tensor = model.generate(prompt, max_new_tokens=6, **options)
    return result


class Seen:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True
