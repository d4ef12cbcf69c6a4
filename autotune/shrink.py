"""A tiny random model of a given model's own class, made from its configuration."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from . import seam

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY, HEADS, HEAD_SIZE, CONTEXT = 128, 4, 16, 128
SIZES: dict[str, Any] = {  # what a configuration may call its sizes -> a small one; those it lacks are not set
    "vocab_size": VOCABULARY,
    "hidden_size": HEADS * HEAD_SIZE,
    "word_embed_proj_dim": HEADS * HEAD_SIZE,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_SIZE,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT,
    "original_max_position_embeddings": CONTEXT,
    "sliding_window": 8,
    "state_size": 8,
    "initializer_range": 0.3,  # large, so that logits are decisive and a wrong cache or mask changes tokens
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")  # one entry a layer


def shrunk(model: PreTrainedModel) -> PreTrainedModel | None:
    """A tiny random model of `model`'s class, on the CPU in FP32, or None where its configuration cannot be shrunk."""
    config: Any = copy.deepcopy(model.config)
    try:
        text = config.get_text_config(decoder=True)
        _shrink(text)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        return built(seam.bare_class(model), config, seam.supports(model, "sdpa"))
    except Exception:  # whatever a configuration or a model's constructor makes of numbers that it did not expect
        return None


def llama() -> PreTrainedModel:
    """A tiny random model of the best known architecture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(num_key_value_heads=2, num_hidden_layers=2)
    _shrink(config)
    return built(LlamaForCausalLM, config, sdpa=True)


def built(cls: Any, config: Any, sdpa: bool) -> PreTrainedModel:
    """A random model of a class, in evaluation mode; the process's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model: Any = cls._from_config(config, attn_implementation="sdpa" if sdpa else "eager", dtype=torch.float32)
    model.eval().requires_grad_(False)
    if sum(parameter.numel() for parameter in model.parameters()) > 4_000_000:
        raise ValueError("it is not tiny")
    made: PreTrainedModel = model
    return made


def _shrink(config: Any) -> None:
    groups = (getattr(config, "num_attention_heads", None) or 1) // (getattr(config, "num_key_value_heads", None) or 1)
    for name, size in SIZES.items():
        if getattr(config, name, None) is not None or name.endswith("_token_id"):
            setattr(config, name, size)
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = HEADS if groups <= 1 else HEADS // 2
    for name in ("rope_scaling", "rope_parameters"):  # factors for each number of a head would not fit another size
        rope = getattr(config, name, None)
        if isinstance(rope, dict) and any(isinstance(value, list) for value in rope.values()):
            setattr(config, name, {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)})
    if isinstance(expand := getattr(config, "expand", None), int):  # state-space models derive their inner size
        config.intermediate_size = expand * config.hidden_size
    kept = _layers(config)
    for name in LAYER_LISTS:
        listed = vars(config).get(name)  # some derive it from other settings
        if isinstance(listed, (list, tuple)):
            setattr(config, name, [listed[k] for k in kept if k < len(listed)])
    config.num_hidden_layers = len(kept)


def _layers(config: Any) -> list[int]:
    """Indices of the layers to keep: the first of each kind, and at least two."""
    listed = [vars(config).get(name) for name in LAYER_LISTS]
    kinds = list(zip(*(entry for entry in listed if isinstance(entry, (list, tuple))), strict=False))
    first = sorted({kinds.index(kind) for kind in kinds})
    return first if len(first) > 1 else [0, 1]
