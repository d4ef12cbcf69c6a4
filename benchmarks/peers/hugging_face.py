"""transformers as it comes: FP32, eager, a growing cache. The reference, and what the other torch runtimes build on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from autotune.diagnose.work import Forward, count, stored_weights
from benchmarks.measures import Timing
from benchmarks.peers import Setup, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stopwatch:
    """A streamer that notes when the first and the latest token arrive; what it is given first is the prompt."""

    def __init__(self) -> None:
        self.puts = 0
        self.first_s = 0.0
        self.last_s = 0.0

    def put(self, value: Any) -> None:
        self.puts += 1
        self.last_s = time.perf_counter()
        if self.puts == 2:
            self.first_s = self.last_s

    def end(self) -> None: ...


class HuggingFace:
    """A model that is asked through `generate`, as users ask it."""

    options: Mapping[str, Any] = {}  # of every call of generate

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.model.generation_config.update(eos_token_id=None, do_sample=False, pad_token_id=0)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        ids = torch.tensor(prompts)  # [B, P]
        single = len(prompts) == 1  # transformers' own streamers take one sequence, so batches are not streamed
        watch = Stopwatch() if single else None
        start = time.perf_counter()
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            streamer=watch,
            **self.call_options(ids.shape[1] + new_tokens),
        )
        end = time.perf_counter()
        if out.shape[1] != ids.shape[1] + new_tokens:
            raise RuntimeError(f"{out.shape[1] - ids.shape[1]} tokens were generated, not {new_tokens}")
        if watch is None:
            return Timing(None, end - start)
        return Timing(watch.first_s - start, watch.last_s - start)

    def call_options(self, tokens: int) -> Mapping[str, Any]:
        """Further arguments of a `generate` whose prompt and answer have `tokens` tokens."""
        return self.options

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Mapping[str, np.ndarray]:
        return {"prefill": self.model(torch.tensor([ids])).logits[0, :-1].float().numpy()}

    def weights(self) -> Weights:
        return Weights(stored_weights(self.model), bytes_per_token(self.model))

    def notes(self) -> list[str]:
        return []


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that a decoding step of one sequence reads: all but the rows of the embedding it looks up."""
    return int(sum(work.weight_bytes for work in count(model, Forward(1, 1, 64), 4).values()))


def load(setup: Setup, **options: Any) -> PreTrainedModel:
    """The checkpoint in FP32."""
    torch.set_num_threads(setup.threads)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        setup.checkpoint, dtype=torch.float32, local_files_only=True, **options
    )
    return model


def create(setup: Setup) -> HuggingFace:
    return HuggingFace(load(setup))
