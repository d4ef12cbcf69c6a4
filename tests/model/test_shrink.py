"""Tiny models of every kind of configuration: each keeps what its own has, once."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from autotune.model import seam, shrink
from tests import architectures

KINDS: dict[str, dict[str, Any]] = {  # what a tiny model's configuration says
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "ministral": {"num_key_value_heads": 2, "head_dim": 16},  # none is said
    "bart": {"decoder_layers": 2, "decoder_attention_heads": 4, "d_model": 64, "vocab_size": 128},
    "prophetnet": {"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "hidden_size": 64},
    "gemma3": {
        "vision_config.num_hidden_layers": 2,
        "text_config.layer_types": ["sliding_attention", "full_attention"],
    },
    "phi4_multimodal": {"audio_config.num_blocks": 2, "vision_config.hidden_size": 64, "hidden_size": 64},
    "qwen3_5": {"layer_types": ["linear_attention", "full_attention"], "model_type": "qwen3_5_text"},
    "deepseek_v3": {"num_hidden_layers": 2, "first_k_dense_replace": 1},
    "lfm2_moe": {"num_hidden_layers": 2, "num_dense_layers": 1},
    "hy_v4": {"indexer_types": ["full", "full", "shared"], "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "smollm3": {"num_hidden_layers": 2, "no_rope_layers": [1, 0]},
    "llama4": {"layer_types": ["chunked_attention", "full_attention"], "moe_layers": [0, 1], "no_rope_layers": [1, 0]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "intermediate_size": [96] * 4,
    },
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
    "inkling2_loop_text": {"num_hidden_layers": 6, "loop_layer_index_start": 2, "loop_layer_index_end": 4},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "beam": {"rope_parameters": {"sliding_attention": architectures.ROPE, "full_attention": None}},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "hybrid_layer_ids": [1]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8},
    "longcat_flash": {"qk_head_dim": 32},
}


def said(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_model_has_each_kind_of_its_layers_and_parts(kind: str) -> None:
    cls, config = seam.causal_lm(kind)
    before = config.to_dict()
    model = shrink.small(cls, config, architectures.SETTINGS.get(kind, {}))
    assert config.to_dict() == before
    assert type(model) is cls
    assert model.num_parameters() < 1_000_000
    assert {name: said(model.config, name) for name in KINDS[kind]} == KINDS[kind]


@pytest.mark.parametrize(
    ("kind", "name", "sizes"),
    [
        ("gemma4_text", "head_dim", [16, 32]),
        ("dots3_note_text", "qk_nope_head_dim", [16, 16, 24]),
        ("dots3_note_text", "num_attention_heads", [4, 4, 2]),
    ],
)
def test_what_differs_from_layer_to_layer_keeps_its_ratio(kind: str, name: str, sizes: list[int]) -> None:
    model = shrink.small(*seam.causal_lm(kind))
    assert [getattr(layer, name) for layer in model.config.per_layer_config] == sizes


def test_a_model_of_one_layer_stays_one() -> None:
    config = LlamaConfig(num_hidden_layers=1)
    assert shrink.small(LlamaForCausalLM, config).config.num_hidden_layers == 1


def test_settings_reach_a_configuration_inside_another() -> None:
    model = shrink.small(*seam.causal_lm("gemma3"), {"head_dim": 8})
    assert model.config.text_config.head_dim == 8
    model = architectures.built("dbrx")
    assert model.config.attn_config.clip_qkv == 8.0
    assert model.config.ffn_config.hidden_size == 64
