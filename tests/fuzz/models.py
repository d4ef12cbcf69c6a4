"""Tiny random models whose weights are small multiples of a power of two, so that packing them loses nothing.

A plan that stores weights in FP16, BF16 or INT8 then has to answer as the original does, but for rounding in sums.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.models import ARCHITECTURES, GROUPED, SPECIAL, tiny

VOCABULARY = 64
LARGEST = 127  # in INT8; one number of each 32 in a row or a column is as large, so that scales are powers of two
GROUP = 32
SPREAD = 40.0  # standard deviation of the others
UNIT = 2.0**-7
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", GROUPED),
    "gemma2": (
        "Gemma2Config",
        GROUPED
        | {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "phi": ("PhiConfig", GROUPED),
}
SHAPES: dict[str, dict[str, int]] = {  # of attention with grouped heads; other architectures have one
    "usual": {},
    "one key": {"num_key_value_heads": 1, "intermediate_size": 72},
    "no groups": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 128},
}
NAMES = sorted({*ARCHITECTURES, *OTHERS})


def build(name: str, seed: int = 0, shape: str = "usual") -> Any:
    """A model [2 layers, hidden size 64, 64 tokens], the same for the same seed."""
    changes = {"vocab_size": VOCABULARY}
    if "num_key_value_heads" in {**ARCHITECTURES, **OTHERS}[name][1]:
        changes |= SHAPES[shape]
    if name in OTHERS:
        config_class, sizes = OTHERS[name]
        torch.manual_seed(seed)
        config = getattr(transformers, config_class)(**(sizes | changes))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        model.generation_config.update(do_sample=False, **SPECIAL)
    else:
        model = tiny(name, seed, **changes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in {id(p): p for p in model.parameters()}.values():
        if parameter.dim() == 2:
            parameter.copy_(_numbers(parameter.shape, generator))
    return model


def _numbers(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    numbers = (torch.randn(shape, generator=generator) * SPREAD).round().clamp(-LARGEST, LARGEST)
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    large = (rows - columns) % GROUP == 0
    for one, other, size in ((rows, columns, shape[1]), (columns, rows, shape[0])):
        if (rest := size % GROUP) != 0:  # the last group is a short one
            large |= (other >= size - rest) & ((one - other) % rest == 0)
    return torch.where(large, signs * LARGEST, numbers) * UNIT


def prompts(rows: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [rows, length] without special tokens. Every other seed repeats itself, so that guesses come true."""
    generator = torch.Generator().manual_seed(seed)
    period = 4 if seed % 2 else length
    ids = torch.randint(SPECIAL["eos_token_id"] + 1, VOCABULARY, (rows, period), generator=generator)
    return ids.repeat(1, -(-length // period))[:, :length]


def padded(rows: int, length: int, seed: int, side: str = "left") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [rows, length]; row r begins, or ends, with r padding tokens."""
    ids, mask = prompts(rows, length, seed), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        cut = min(row, length - 1)
        where = slice(0, cut) if side == "left" else slice(length - cut, length)
        ids[row, where], mask[row, where] = SPECIAL["pad_token_id"], 0
    return {"input_ids": ids, "attention_mask": mask}
