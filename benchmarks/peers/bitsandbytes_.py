"""bitsandbytes through transformers: NF4, which on CPUs takes half the time of its LLM.int8."""

from __future__ import annotations

from transformers import BitsAndBytesConfig

from benchmarks.peers import Setup
from benchmarks.peers.hugging_face import HuggingFace, load


def create(setup: Setup) -> HuggingFace:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return HuggingFace(load(setup, quantization_config=nf4, device_map="cpu"))
