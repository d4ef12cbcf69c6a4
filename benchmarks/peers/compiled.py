"""transformers with a static cache and torch.compile, as FP32 or with torchao's INT8 weights.

The decoding step is what transformers itself compiles; it does so on GPUs alone unless asked to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CompileConfig

from benchmarks.peers import Setup
from benchmarks.peers.hugging_face import HuggingFace, load

SLOTS = 128  # cache sizes are multiples of it: attention goes over every slot, so short requests get short caches


class Compiled(HuggingFace):
    def call_options(self, tokens: int) -> Mapping[str, Any]:
        config = CompileConfig(mode="default", dynamic=True)  # other batch and cache sizes: no compilation of their own
        config._compile_all_devices = True  # type: ignore[assignment]  # declared without a type
        slots = -(-tokens // SLOTS) * SLOTS
        return {"cache_implementation": "static", "max_cache_len": slots, "compile_config": config}

    def notes(self) -> list[str]:
        return ["one sequence and several are compiled apart; only the first is in the time to ready"]


def create(setup: Setup, int8: bool = False) -> Compiled:
    model = load(setup)
    if int8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    return Compiled(model)
