"""bitsandbytes through transformers: LLM.int8 or NF4."""

from __future__ import annotations

from transformers import BitsAndBytesConfig

from benchmarks.peers import Setup
from benchmarks.peers.hugging_face import HuggingFace, load


def create(setup: Setup, bits: int) -> HuggingFace:
    scheme = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return HuggingFace(load(setup, quantization_config=BitsAndBytesConfig(**scheme), device_map="cpu"))
