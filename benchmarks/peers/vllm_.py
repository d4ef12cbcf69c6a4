"""vLLM's CPU build, in one process, on the checkpoint in FP32 or another dtype. It needs an environment of its own."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.measures import Timing
from benchmarks.peers import Setup, Weights

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # its other processes would wait actively while others are timed
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # OMP_NUM_THREADS threads, as everybody else
    VLLM_NO_USAGE_STATS="1",
)

from vllm import LLM, SamplingParams

if TYPE_CHECKING:
    import numpy as np

MOST_SEQUENCES = 32  # that any benchmark asks for at once


class Vllm:
    def __init__(self, setup: Setup, dtype: str) -> None:
        llm = LLM(
            setup.checkpoint,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=setup.longest,
            max_num_seqs=max(MOST_SEQUENCES, *setup.batch_sizes),
            enable_prefix_caching=False,
        )
        self.engine: Any = llm.llm_engine
        self.dtype = dtype
        self.numbers = itertools.count()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        begun, first_s = set[str](), 0.0
        start = time.perf_counter()
        waiting = {self._ask(ids, new_tokens) for ids in prompts}
        while waiting:
            for request in self.engine.step():
                begun.add(request.request_id)
                if request.finished:
                    waiting.remove(request.request_id)
            first_s = first_s or (time.perf_counter() - start if len(begun) == len(prompts) else 0.0)
        return Timing(first_s, time.perf_counter() - start)

    def serve(self, asked: Sequence[Sequence[Sequence[int]]], new_tokens: int) -> list[float]:
        """By its engine, which takes a request as soon as its caller has the answer before."""
        start, ended = time.perf_counter(), list[float]()
        callers = [iter(prompts) for prompts in asked]
        running: dict[str, Iterable[Sequence[int]]] = {}

        def ask(caller: Any) -> None:
            if (ids := next(caller, None)) is not None:
                running[self._ask(ids, new_tokens)] = caller

        for caller in callers:
            ask(caller)
        while running:
            for request in self.engine.step():
                if request.finished:
                    found = len(request.outputs[0].token_ids)
                    if found != new_tokens:
                        raise RuntimeError(f"{found} tokens were generated, not {new_tokens}")
                    ended.append(time.perf_counter() - start)
                    ask(running.pop(request.request_id))
        return ended

    def _ask(self, ids: Sequence[int], new_tokens: int) -> str:
        """Begin to answer one prompt."""
        name = str(next(self.numbers))
        how = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, {"prompt_token_ids": list(ids)}, how)
        return name

    def logits(self, ids: Sequence[int]) -> Mapping[str, np.ndarray]:
        return {}

    def weights(self) -> Weights:
        return Weights()

    def notes(self) -> list[str]:
        return [f"in {self.dtype}, in one process"]


def create(setup: Setup, dtype: str) -> Vllm:
    return Vllm(setup, dtype)
