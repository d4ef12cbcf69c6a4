"""autotune: a wrapped model, tuned before its first request for prompts as long as those that are measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import AutoTokenizer, LogitsProcessor

import autotune
from autotune.diagnose.work import stored_weights
from benchmarks.peers import Setup, Weights
from benchmarks.peers.hugging_face import HuggingFace, bytes_per_token, load

LEAD = 8  # tokens of a text that are prefilled before the rest is decoded one by one


class Teacher(LogitsProcessor):
    """Keeps each step's logits and makes the text's next token the only choice."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self.rows = list[np.ndarray]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.rows.append(scores[0].float().numpy().copy())
        forced = torch.full_like(scores, -torch.inf)
        forced[0, self.ids[input_ids.shape[1]]] = 0.0
        return forced


class Tuned(HuggingFace):
    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Mapping[str, np.ndarray]:
        """Of both phases, which may run on different weights."""
        lead, teacher = torch.tensor([ids[:LEAD]]), Teacher(ids)
        self.model.generate(
            input_ids=lead,
            attention_mask=torch.ones_like(lead),
            max_new_tokens=len(ids) - LEAD,
            logits_processor=[teacher],
        )
        return {**super().logits(ids), "decode": np.stack(teacher.rows)}

    def weights(self) -> Weights:
        serving = self.model.autotune._serving.active
        if serving is None:
            return super().weights()
        decode = serving.modules["decode"]
        return Weights(stored_weights(serving.original, *serving.modules.values()), bytes_per_token(decode))

    def notes(self) -> list[str]:
        status = self.model.autotune.status
        told = " + ".join(status.transforms) or "the original"
        bypassed = "; ".join(f"{count} to the original: {reason}" for reason, count in status.bypassed.items())
        return [f"{status.state}: {told}", *([f"of its calls {bypassed}"] if bypassed else [])]


def create(setup: Setup, policy: str) -> Tuned:
    runtime = Tuned(load(setup))
    workload = autotune.Workload(tuple(map(tuple, setup.workload)), setup.new_tokens, tuple(setup.batch_sizes))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    autotune.wrap(
        runtime.model,
        tokenizer=AutoTokenizer.from_pretrained(setup.checkpoint, local_files_only=True),
        policy=policy,
        workload=workload,
        when="blocking",
        progress=say,
    )
    return runtime
