"""Random BF16 models in the shapes of the Llama 3 family, made on the device that runs them.

They cost what trained ones cost. What a quality gate says about them means nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {  # meta-llama/Llama-3.2-1B and Llama-3.1-8B, config.json
    "1b": COMMON | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "8b": COMMON | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}
SEED = 0


def random_model(shape: str, device: str, layers: int | None = None) -> PreTrainedModel:
    """A model with random weights.

    Args:
        shape: a name in `SHAPES`.
        device: torch's name of the device.
        layers: decoder layers; None means as many as the shape has.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    given = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    with torch.device(device):
        return LlamaForCausalLM._from_config(LlamaConfig(**given, dtype="bfloat16")).eval()


def random_prompts(vocabulary: int, tokens: int, count: int) -> list[list[int]]:
    """Prompts of `tokens` tokens, all different."""
    draw = torch.Generator().manual_seed(SEED)
    return [torch.randint(3, vocabulary, (tokens,), generator=draw).tolist() for _ in range(count)]
