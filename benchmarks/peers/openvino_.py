"""OpenVINO GenAI on a Q8_0 GGUF, which is quantised with llama.cpp where the machine has no such file yet.

The pipeline gives no logits, so they come from the same model compiled with the same properties by OpenVINO itself.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from benchmarks.measures import Timing
from benchmarks.peers import Setup, Weights

MODEL = "openvino_model.xml"
CACHE_GB = 1  # of the continuous batching's KV cache


class OpenVino:
    def __init__(self, file: Path, properties: Mapping[str, Any]) -> None:
        self.file = file
        self.properties = dict(properties)
        self.batching: Any = None
        self.pipeline = genai.LLMPipeline(str(file), "CPU", **self.properties)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        ids = np.array(prompts, dtype=np.int64)  # [B, P]
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        start = time.perf_counter()
        result = self.pipeline.generate(inputs, config)
        total_s = time.perf_counter() - start
        short = [len(tokens) for tokens in result.tokens if len(tokens) != new_tokens]
        if short or len(result.tokens) != len(prompts):
            raise RuntimeError(f"{short or len(result.tokens)} tokens were generated, not {new_tokens} a prompt")
        return Timing(result.perf_metrics.get_ttft().mean / 1e3 if new_tokens > 1 else total_s, total_s)

    def serve(self, asked: Sequence[Sequence[Sequence[int]]], new_tokens: int) -> list[float]:
        """By its ContinuousBatchingPipeline, which takes a request as soon as its caller has the answer before."""
        if self.batching is None:
            scheduler = genai.SchedulerConfig()
            scheduler.cache_size = CACHE_GB
            scheduler.enable_prefix_caching = False
            self.batching = genai.ContinuousBatchingPipeline(
                str(self.file.parent), scheduler, "CPU", properties=self.properties
            )
        config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        waiting, numbers = [list(prompts) for prompts in asked], itertools.count()

        def ask(caller: int) -> Any:
            ids = openvino.Tensor(np.array([waiting[caller].pop(0)], dtype=np.int64))
            return self.batching.add_request(next(numbers), ids, config)

        start, ended = time.perf_counter(), list[float]()
        running = {caller: ask(caller) for caller in range(len(asked))}
        while running:
            self.batching.step()
            for caller, handle in list(running.items()):
                if handle.get_status() != genai.GenerationStatus.FINISHED:
                    continue
                found = handle.read_all()[0].generated_ids
                if len(found) != new_tokens:
                    raise RuntimeError(f"{len(found)} tokens were generated, not {new_tokens}")
                ended.append(time.perf_counter() - start)
                del running[caller]
                if waiting[caller]:
                    running[caller] = ask(caller)
        return ended

    def logits(self, ids: Sequence[int]) -> Mapping[str, np.ndarray]:
        saved = self.file.parent / MODEL
        if not saved.exists():
            return {}
        request = openvino.Core().compile_model(saved, "CPU", self.properties).create_infer_request()
        tokens = np.array([ids], dtype=np.int64)
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(tokens.shape[1], dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        rows = request.infer(inputs)["logits"][0, :-1]  # [P - 1, V]
        return {"prefill": np.array(rows, dtype=np.float32)}

    def weights(self) -> Weights:
        size = self.file.stat().st_size  # as stored; what the plugin keeps in memory is its own affair
        return Weights(size, size)

    def notes(self) -> list[str]:
        told = ", ".join(f"{name}={value}" for name, value in self.properties.items())
        return [f"{told}; its weights are counted as the file stores them"]


def _file(setup: Setup) -> Path:
    """The model in a folder of its own, where the pipeline may save it in OpenVINO's format beside the GGUF."""
    name = Path(setup.gguf).stem
    return Path(setup.files) / "openvino" / name / f"{name}.Q8_0.gguf"


def _properties(setup: Setup, precision: str) -> dict[str, Any]:
    hint = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    return {"INFERENCE_NUM_THREADS": setup.threads, **hint}


def prepare(setup: Setup, precision: str = "") -> None:
    """The GGUF of this type, and the same in OpenVINO's format."""
    from benchmarks.peers import llama  # for its quantiser

    file = _file(setup)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(llama.quantise(setup, "Q8_0"), file)
    if not (file.parent / MODEL).exists():
        genai.LLMPipeline(str(file), "CPU", enable_save_ov_model=True)


def create(setup: Setup, precision: str = "") -> OpenVino:
    return OpenVino(_file(setup), _properties(setup, precision))
