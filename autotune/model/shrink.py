"""A tiny random model of a given model's own class, made from its configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
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
] = (  # a small size, and the settings that get it; settings that a configuration lacks are not added
    (
        VOCABULARY,
        (
            *("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"),
            *("pronunciation_vocab_size", "shape_vocab_size", "encoder_hash_byte_group_vocab", "ngram_vocab_size_base"),
        ),
    ),
    (
        WIDTH,
        (
            *("hidden_size", "word_embed_proj_dim", "d_model", "embedding_size", "embedding_dim", "lru_width"),
            *("attention_hidden_size", "hidden_size_global", "ple_embed_dim", "feed_forward_size"),
            *("pronunciation_embed_dim", "shape_embed_dim"),
            *("out_hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"),  # of images
            *("adapter_out_dim", "ext_pw_out_channel", "nemo_conv_channels"),  # of sound
            "depthwise_separable_out_channel",
        ),
    ),
    (
        96,
        (
            *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "ffn_hidden_size"),
            *("intermediate_size_mlp", "mlp_dim"),
        ),
    ),
    (
        HEADS,
        (
            *("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads"),
            *("num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"),
            *("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads", "indexer_n_heads"),
        ),
    ),
    (
        HEAD_SIZE,
        (
            *("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "dim_head", "global_head_dim"),
            *("mamba_d_head", "mamba_head_dim", "mamba_headdim", "linear_key_head_dim", "linear_value_head_dim"),
            *("index_head_dim", "linear_head_dim", "indexer_head_dim", "swa_head_dim", "attention_head_size"),
        ),
    ),
    (
        32,
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
            *("shared_experts_intermediate_size", "q_lora_rank", "kv_lora_rank", "o_lora_rank"),
            *("expert_ffn_hidden_size", "hc_lowrank", "rel_extent"),
        ),
    ),
    (
        4,
        (
            *("num_local_experts", "num_experts", "n_routed_experts", "index_topk", "mamba_d_conv", "zero_expert_num"),
            *("moe_num_experts", "indexer_compress_ratio"),
        ),
    ),
    (
        2,
        (
            *("num_experts_per_tok", "moe_topk", "moe_top_k", "encoder_layers", "decoder_layers", "num_encoder_layers"),
            *("num_decoder_layers", "num_blocks", "depth", "attn_layer_period", "expert_layer_period"),
        ),
    ),
    (
        1,
        (
            *("n_group", "topk_group", "attn_layer_offset", "expert_layer_offset", "mamba_n_groups", "n_groups"),
            *("indexer_kv_heads", "n_layers_per_attn_res_block"),
        ),
    ),
    (CONTEXT, ("max_position_embeddings", "original_max_position_embeddings", "max_target_positions")),
    (
        8,
        (
            *("sliding_window", "window_size", "attention_chunk_size", "indexer_budget"),
            *("state_size", "mamba_d_state", "rotary_dim", "hidden_size_per_layer_input"),
        ),
    ),
    # large, so that logits differ clearly: a wrong cache or mask then changes tokens
    (0.3, ("initializer_range", "init_std", "initializer_factor")),
)
SIZES: dict[str, Any] = {name: size for size, names in NAMES for name in names}
GROUPED = ("num_key_value_heads", "swa_num_key_value_heads")
MAMBA = {"mamba_n_heads": HEAD_SIZE, "mamba_num_heads": HEAD_SIZE, "n_mamba_heads": HEAD_SIZE, "mamba_d_ssm": 1}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# settings that list a kind for each layer
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "no_rope_layers")
# settings that list the numbers of the layers of one kind
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "ple_layer_ids", "hybrid_layer_ids", "full_attn_idxs")
LOOP = ("loop_layer_index_start", "loop_layer_index_end")
# settings that count the layers of one kind at the beginning, or at the end
FIRST = ("first_k_dense_replace", "num_dense_layers", "n_input_layers", *LOOP)
LAST = ("num_kv_shared_layers", "n_output_layers")


def shrunk(model: PreTrainedModel) -> PreTrainedModel | None:
    """A tiny random model of `model`'s class, on the CPU in FP32, or None if its configuration cannot be shrunk."""
    try:
        return small(seam.bare_class(model), model.config)
    except Exception:  # configurations and constructors may raise anything for sizes they do not expect
        return None


def small(cls: Any, config: Any, settings: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedModel:
    """A tiny random model of a class, on the CPU in FP32, from a configuration of any size, which is not changed.

    Args:
        settings: values to set in the text model's configuration; for a configuration inside it, another mapping.

    Raises:
        ValueError and others: the configuration cannot be shrunk.
    """
    config = copy.deepcopy(config)
    parts = list(_parts(config))
    for part in parts:
        _shrink(part)
    decoder = config.get_text_config(decoder=True)  # for some configurations a copy
    text = next((part for part in parts if part is decoder), config)
    for name, token in SPECIAL.items():
        for holder in (config, text):
            _set(holder, name, token)
    _apply(text, settings)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return built(cls, config, seam.supports(cls, "sdpa"))


def llama() -> PreTrainedModel:
    """A tiny random Llama model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(num_key_value_heads=2, num_hidden_layers=2)
    _shrink(config)
    for name, token in SPECIAL.items():
        _set(config, name, token)
    return built(LlamaForCausalLM, config, sdpa=True)


def built(cls: Any, config: Any, sdpa: bool) -> PreTrainedModel:
    """A random model of a class, in evaluation mode. The process's random state does not change."""
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


def _apply(config: Any, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if hasattr(inside := _get(config, name), "get_text_config"):
            _apply(inside, value)
        else:
            setattr(config, name, value)


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and the ones inside it, for text, images or sound."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "get_text_config"):
            yield from _parts(value)


def _shrink(config: Any) -> None:
    groups = {name: _groups(config, name) for name in GROUPED}
    different = _layers_that_differ(config)
    wider = (_get(config, "attention_hidden_size") or 1) // (_get(config, "hidden_size") or 1)
    before = dict(vars(config))
    for name, size in SIZES.items():
        if (old := _get(config, name)) is not None:
            _set(config, name, [size] * len(old) if isinstance(old, list) else size)
    for name, each in groups.items():
        if each is not None:
            _set(config, name, HEADS if each <= 1 else HEADS // 2)
    if vars(config).get("head_dim", 0) is None:
        _set(config, "head_dim", HEAD_SIZE)
    if _get(config, "qk_head_dim") is not None:
        _set(config, "qk_head_dim", 2 * HEAD_SIZE)  # a part with positions and a part without
    if wider > 1:
        _set(config, "attention_hidden_size", wider * WIDTH)
        _set(config, "attention_head_dim", wider * HEAD_SIZE)
    name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"  # to 4.57
    if isinstance(rope := _get(config, name), dict):
        setattr(config, name, _rope(rope, whole=_get(config, "qk_rope_head_dim") is not None))
    if isinstance(expand := _get(config, "expand"), int):  # state-space models derive their inner size
        _set(config, "intermediate_size", expand * WIDTH)
        _set(config, "num_heads", expand * WIDTH // HEAD_SIZE)
    inner = int(_get(config, "mamba_expand") or 2) * WIDTH
    for name, size in MAMBA.items():
        if isinstance(_get(config, name), int):
            _set(config, name, inner // size)
    if hasattr(config, "attn_layer_indices"):
        config.attn_layer_indices = [1]
    if _get(config, "num_hidden_layers") is not None:
        kept = _leave_out_layers(config)
        if different:
            config.per_layer_config = {
                number: {
                    name: _scaled(value, before.get(name), _get(config, name)) for name, value in different[k].items()
                }
                for number, k in enumerate(kept)
            }


def _scaled(value: Any, whole: Any, size: Any) -> Any:
    """A layer's value, scaled to keep its ratio to the value of the other layers."""
    if not (type(value) is type(whole) is type(size) is int):
        return value
    return max(1, value * size // whole)


def _groups(config: Any, name: str) -> int | None:
    """Number of heads that share one key and value head, or None if a configuration does not say."""
    if not hasattr(type(config), name) and _get(config, name) is None:
        return None
    return int(_get(config, name.replace("key_value", "attention")) or 1) // int(_get(config, name) or 1)


def _layers_that_differ(config: Any) -> list[dict[str, Any]]:
    """Remove the per-layer settings from a configuration; returns them, one dictionary per layer."""
    if not getattr(config, "is_heterogeneous", False):
        return []
    names = [*config.per_layer_attributes, "skip"]
    found = [
        {name: value for name in names if (value := getattr(layer, name)) != []} for layer in config.per_layer_config
    ]
    config.per_layer_config = None
    return found


def _rope(rope: dict[str, Any], whole: bool) -> dict[str, Any]:
    """Rotary settings without factors for each number of a head, which would not fit another head size.

    Args:
        whole: whether heads have a separate part for positions, all of which is rotated.
    """
    if any(isinstance(value, dict) for value in rope.values()):  # settings for each kind of layer
        return {kind: _rope(each, whole) if isinstance(each, dict) else each for kind, each in rope.items()}
    if any(value is None or isinstance(value, list) for value in rope.values()):
        return {"rope_type": "default", "rope_theta": rope.get("rope_theta") or 10000.0}
    return {**rope, "partial_rotary_factor": 1.0} if whole and "partial_rotary_factor" in rope else rope


def _leave_out_layers(config: Any) -> list[int]:
    """Keep one layer of each kind; returns the numbers of the kept layers."""
    depth, stack = int(_get(config, "num_hidden_layers")), _get(config, "num_layers_per_stack")
    if stack:  # the same layers run several times, each time with another cache
        _set(config, "num_layers_per_stack", 1)
        _set(config, "num_hidden_layers", depth // stack)
        return []
    kept = _layers(config, depth)
    for name, value in list(vars(config).items()):
        if name in INDEX_LISTS and value is not None:
            _set(config, name, [number for number, k in enumerate(kept) if k in value])
        elif name in FIRST and isinstance(value, int):
            _set(config, name, sum(k < value for k in kept))
        elif name in LAST and isinstance(value, int):
            _set(config, name, sum(k >= depth - value for k in kept))
        elif isinstance(value, (list, tuple)) and (name in LAYER_LISTS or len(value) == depth):
            _set(config, name, type(value)(value[k] for k in kept if k < len(value)))
    if _get(config, "n_recurrent_layers") is not None:
        _set(config, "n_recurrent_layers", len(kept) - config.n_input_layers - config.n_output_layers)
    _set(config, "num_hidden_layers", len(kept))
    return kept


def _get(config: Any, name: str) -> Any:
    """A configuration's value, or None if it has none or raises because the value differs between layers."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _set(config: Any, name: str, value: Any) -> None:
    """Set a configuration's value if it can be set. Some configurations derive it from other settings."""
    with suppress(AttributeError, NotImplementedError):
        setattr(config, name, value)


def _layers(config: Any, depth: int) -> list[int]:
    """Indices of the layers to keep: the first of each kind, and at least two if there are two."""
    said = vars(config)
    listed = [said[name] for name in LAYER_LISTS if isinstance(said.get(name), (list, tuple)) and said[name]]
    first = [[k < said[name] for k in range(depth)] for name in FIRST if isinstance(said.get(name), int)]
    derived = [list(kinds) for name in LAYER_LISTS if isinstance(kinds := _get(config, name), (list, tuple))]
    if derived and not listed:  # derived from the layers' numbers by a pattern: no layer in between can be left out
        return list(range(max([2, *(kinds.index(kind) + 1 for kinds in derived + first for kind in kinds)])))
    last = [[k >= depth - said[name] for k in range(depth)] for name in LAST if isinstance(said.get(name), int)]
    some = [[k in said[name] for k in range(depth)] for name in INDEX_LISTS if said.get(name) is not None]
    kinds = list(zip(*listed, *first, *last, *some, strict=False))
    kept = sorted({kinds.index(kind) for kind in kinds})
    return kept if len(kept) > 1 else list(range(min(2, depth)))
