"""A tiny random model of a given model's own class, made from its configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from . import seam

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY, HEADS, HEAD_SIZE, CONTEXT = 128, 4, 16, 128
WIDTH = HEADS * HEAD_SIZE
MOST_PARAMETERS = 4_000_000
NAMES: tuple[
    tuple[Any, tuple[str, ...]], ...
] = (  # a small size -> what configurations call it; those that one lacks are not set
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input")),
    (WIDTH, ("hidden_size", "word_embed_proj_dim", "d_model", "embedding_size", "lru_width", "attention_hidden_size")),
    (96, ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "ffn_hidden_size")),
    (
        HEADS,
        (
            *("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"),
            *("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"),
        ),
    ),
    (
        HEAD_SIZE,
        (
            *("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "dim_head", "global_head_dim"),
            *("mamba_d_head", "mamba_head_dim", "mamba_headdim", "linear_key_head_dim", "linear_value_head_dim"),
            "index_head_dim",
        ),
    ),
    (
        32,
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
            *("q_lora_rank", "kv_lora_rank", "o_lora_rank", "expert_ffn_hidden_size"),
        ),
    ),
    (4, ("num_local_experts", "num_experts", "n_routed_experts", "index_topk", "mamba_d_conv", "zero_expert_num")),
    (
        2,
        (
            *("num_experts_per_tok", "moe_topk", "encoder_layers", "decoder_layers", "num_encoder_layers"),
            *("num_decoder_layers", "attn_layer_period", "expert_layer_period"),
        ),
    ),
    (1, ("n_group", "topk_group", "attn_layer_offset", "expert_layer_offset", "mamba_n_groups", "n_groups")),
    (CONTEXT, ("max_position_embeddings", "original_max_position_embeddings")),
    (8, ("sliding_window", "window_size", "state_size", "mamba_d_state", "rotary_dim", "hidden_size_per_layer_input")),
    (0.3, ("initializer_range", "init_std")),  # large: logits are decisive, and a wrong cache or mask changes tokens
)
SIZES: dict[str, Any] = {name: size for size, names in NAMES for name in names}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")  # one entry a layer


def shrunk(model: PreTrainedModel) -> PreTrainedModel | None:
    """A tiny random model of `model`'s class, on the CPU in FP32, or None where its configuration cannot be shrunk."""
    try:
        return small(seam.bare_class(model), model.config)
    except Exception:  # whatever a configuration or a model's constructor makes of numbers that it did not expect
        return None


def small(cls: Any, config: Any, settings: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedModel:
    """A tiny random model of a class, on the CPU in FP32, from a configuration of any size, which stays as it is.

    Args:
        settings: of the text model, to be as they are here.

    Raises:
        ValueError and others: the configuration cannot be shrunk.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    _shrink(text)
    for name, token in SPECIAL.items():
        for holder in (config, text):
            _set(holder, name, token)
    for name, value in settings.items():
        setattr(text, name, value)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return built(cls, config, seam.supports(cls, "sdpa"))


def llama() -> PreTrainedModel:
    """A tiny random model of the best known architecture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(num_key_value_heads=2, num_hidden_layers=2)
    _shrink(config)
    for name, token in SPECIAL.items():
        _set(config, name, token)
    return built(LlamaForCausalLM, config, sdpa=True)


def built(cls: Any, config: Any, sdpa: bool) -> PreTrainedModel:
    """A random model of a class, in evaluation mode; the process's random numbers stay as they are."""
    how: dict[str, Any] = {"attn_implementation": "sdpa" if sdpa else "eager", "dtype": torch.float32}
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls._from_config(copy.deepcopy(config), **how).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(
            f"it has {size / 1e6:.0f} million parameters where {MOST_PARAMETERS // 1_000_000} would be tiny"
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model: Any = cls._from_config(config, **how)
    model.eval().requires_grad_(False)
    made: PreTrainedModel = model
    return made


def _shrink(config: Any) -> None:
    groups = (_get(config, "num_attention_heads") or 1) // (_get(config, "num_key_value_heads") or 1)
    for name, size in SIZES.items():
        if _get(config, name) is not None:
            _set(config, name, size)
    if hasattr(type(config), "num_key_value_heads") or _get(config, "num_key_value_heads") is not None:
        _set(config, "num_key_value_heads", HEADS if groups <= 1 else HEADS // 2)
    name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"  # to 4.57
    rope = _get(config, name)  # factors for each number of a head would not fit another size
    if isinstance(rope, dict) and any(value is None or isinstance(value, list) for value in rope.values()):
        setattr(config, name, {"rope_type": "default", "rope_theta": rope.get("rope_theta") or 10000.0})
    if isinstance(expand := _get(config, "expand"), int):  # state-space models derive their inner size
        _set(config, "intermediate_size", expand * WIDTH)
        _set(config, "num_heads", expand * WIDTH // HEAD_SIZE)
    for name in ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"):
        if isinstance(_get(config, name), int):
            _set(config, name, int(_get(config, "mamba_expand") or 2) * WIDTH // HEAD_SIZE)
    if hasattr(config, "attn_layer_indices"):
        config.attn_layer_indices = [1]
    kept = _layers(config)
    for name in LAYER_LISTS:
        listed = vars(config).get(name)  # some derive it from other settings
        if isinstance(listed, (list, tuple)):
            setattr(config, name, [listed[k] for k in kept if k < len(listed)])
    _set(config, "num_hidden_layers", len(kept))


def _get(config: Any, name: str) -> Any:
    """What a configuration says, or None; one that differs from layer to layer raises."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _set(config: Any, name: str, value: Any) -> None:
    """Where it can be said: some derive it from other settings."""
    with suppress(AttributeError, NotImplementedError):
        setattr(config, name, value)


def _layers(config: Any) -> list[int]:
    """Indices of the layers to keep: the first of each kind, and at least two."""
    listed = [vars(config).get(name) for name in LAYER_LISTS]
    derived = [tuple(kinds) for name in LAYER_LISTS if isinstance(kinds := _get(config, name), (list, tuple))]
    if derived and not any(listed):  # from a pattern that goes by the layers' numbers: no layer can be left out
        return list(range(max(2, *(max(map(kinds.index, kinds), default=0) + 1 for kinds in derived))))
    kinds = list(zip(*(entry for entry in listed if isinstance(entry, (list, tuple))), strict=False))
    first = sorted({kinds.index(kind) for kind in kinds})
    return first if len(first) > 1 else [0, 1]
