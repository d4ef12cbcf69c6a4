"""Merged projections: where there are some, that they compute the same, and that what is unknown is left alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import OlmoConfig, OlmoForCausalLM

from autotune.model import linear_layers
from autotune.runtime.dispatch import serving
from autotune.runtime.merged_blocks import MergedAttention, MergedMlp, stand_in
from autotune.runtime.variant import Variant
from autotune.transforms import make
from tests import models
from tests.transforms.test_contract import COMPILER

MERGED = make("merged_linears", {})
ALREADY = "no plain projections of one input"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("architecture", "attention", "mlps"),
    [
        ("llama", 2, 2),
        ("qwen3", 2, 2),  # with norms of queries and keys
        ("mistral-window", 2, 2),
        ("gemma3", 2, 2),
        ("mixtral", 2, 0),  # experts are no layers
        ("phi3", 0, 0),  # merged in the checkpoint
        ("gpt-neox", 0, 0),
        ("gpt2", 0, 0),
        ("opt", 0, 0),  # scales queries in between: another form
        ("mamba", 0, 0),
    ],
)
def test_architectures(architecture: str, attention: int, mlps: int, dtype: torch.dtype) -> None:
    model = models.tiny(architecture).to(dtype)
    variant = Variant(model)
    reason = MERGED.unavailable(variant, COMPILER)
    if not attention + mlps:
        assert ALREADY in (reason or "")
        return
    assert reason is None
    candidate = variant.with_transform(MERGED)
    assert MERGED.took_effect(candidate) is None
    assert "merged already" in (MERGED.unavailable(candidate, COMPILER) or "")
    module = candidate.modules["decode"]
    assert (linear_layers.count(module, MergedAttention), linear_layers.count(module, MergedMlp)) == (attention, mlps)
    for inputs in (models.left_padded(), {"input_ids": torch.tensor(models.token_prompts(2, 20))}):
        got = serving(candidate).generate(**inputs, max_new_tokens=12, min_new_tokens=12)
        assert torch.equal(got, model.generate(**inputs, max_new_tokens=12, min_new_tokens=12))
    ids = torch.tensor(models.token_prompts(2, 20))
    with torch.no_grad():
        got, expected = module(ids).logits.float(), model(ids).logits.float()
    assert (got - expected).norm() <= {torch.float32: 1e-5}.get(dtype, 2e-2) * expected.norm()


@pytest.mark.parametrize(
    "others",
    [
        [("attention", {"implementation": "eager"}, "both")],
        [("static_cache", {}, "decode")],
        [("lean_loop", {}, "decode")],
        [("prefill_attention", {}, "prefill")],
        [("step_program", {}, "decode")],
    ],
    ids=str,
)
def test_with_other_transforms(others: list[Any]) -> None:
    model = models.tiny("llama")
    variant = Variant(model).with_transform(MERGED)
    for other in (make(*each) for each in others):
        if (reason := other.unavailable(variant, COMPILER)) is not None:
            pytest.skip(reason)
        variant = variant.with_transform(other)
        assert other.took_effect(variant) is None
    ids = torch.tensor(models.token_prompts(1, 20))
    got = serving(variant).generate(ids, max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(got, model.generate(ids, max_new_tokens=8, min_new_tokens=8))


def test_quantisation_packs_the_merged_layer_and_its_copy_goes() -> None:
    model = models.tiny("llama")
    merged = Variant(model).with_transform(MERGED)
    assert {n.rpartition(".")[2] for n in linear_layers.linears(merged.modules["decode"])} == {
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
        "lm_head",
    }
    packed = merged.with_transform(make("linear_dtype", {}, "both"))
    held = [linear_layers.stored_bytes(model, *v.modules.values()) for v in (Variant(model), merged, packed)]
    copied = 2 * 4 * 64 * (64 + 2 * 32 + 2 * 96)  # layers, bytes, inputs, outputs of q, k and v, gate and up
    assert held[1] == held[0] + copied == held[0] + MERGED.extra_bytes(Variant(model))
    parts = linear_layers.linears(model).values()
    assert held[2] == held[0] + sum(2 * part.weight.numel() for part in parts)


def test_after_quantisation_nothing_is_left() -> None:
    quantised = Variant(models.tiny("llama")).with_transform(make("linear_dtype", {}))
    assert ALREADY in (MERGED.unavailable(quantised, COMPILER) or "")


class Scaled(nn.Module):
    """A gated block that does something else between."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 16)
        self.up_proj = nn.Linear(8, 16)
        self.down_proj = nn.Linear(16, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(2 * self.gate_proj(x)) * self.up_proj(x))


def _attention(change: Callable[[Any], None]) -> nn.Module:
    block = models.tiny("llama").model.layers[1].self_attn
    change(block)
    return block


def _derived(**methods: Any) -> Callable[[Any], None]:
    """A change of a block's class to one with other methods."""

    def change(block: Any) -> None:
        block.__class__ = type("Derived", (type(block),), methods)

    return change


def _other_slot(self: Any, *args: Any, **kwargs: Any) -> Any:
    self.layer_idx += 1
    try:
        return super(type(self), self).forward(*args, **kwargs)
    finally:
        self.layer_idx -= 1


def _projected(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    return self.o_proj(hidden_states), None


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(Scaled, id="another form"),
        pytest.param(lambda: _attention(lambda b: b.q_proj.register_forward_hook(lambda *_: None)), id="hook"),
        pytest.param(lambda: _attention(lambda b: setattr(b, "forward", b.forward)), id="changed forward"),
        pytest.param(lambda: _attention(lambda b: setattr(b, "k_proj", b.k_proj.bfloat16())), id="mixed dtypes"),
        pytest.param(lambda: _attention(lambda b: setattr(b, "k_proj", nn.Linear(64, 32))), id="one bias"),
        pytest.param(lambda: _attention(lambda b: setattr(b, "extra", nn.Linear(64, 32))), id="another layer"),
        pytest.param(lambda: _attention(_derived(forward=_other_slot)), id="another cache slot"),
        pytest.param(
            lambda: _attention(_derived(forward=lambda self, x, **_: (self.o_proj(x), None))), id="other work"
        ),
    ],
)
def test_what_is_unknown_is_left_alone(module: Callable[[], nn.Module]) -> None:
    with torch.no_grad():
        assert stand_in(module().requires_grad_(False)) is None


def test_what_a_block_tells_its_attention_is_told_by_the_stand_in() -> None:
    """The window is in no tensor: flash attention would compute something else without it."""
    block = models.tiny("mistral-window").model.layers[0].self_attn
    with torch.no_grad():
        merged = stand_in(block)
    assert isinstance(merged, MergedAttention)
    assert merged._constants["sliding_window"] == 8
    assert merged.config is block.config
    assert SimpleNamespace(**vars(block)).layer_idx == merged.layer_idx == 0


def test_a_clip_that_usual_inputs_do_not_reach_is_kept() -> None:
    """OLMo's queries, keys and values are clipped."""
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        clip_qkv=8.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = OlmoForCausalLM(config).eval().requires_grad_(False)
    input_ = F.layer_norm(model.model.embed_tokens.weight[5], (64,))
    model.model.layers[0].self_attn.v_proj.weight[:16] = 2 * input_ / input_.norm()  # of token 5 it makes 16
    variant = Variant(model).with_transform(MERGED)
    assert not [m for m in variant.modules["prefill"].modules() if isinstance(m, MergedAttention)]
    ids = torch.full((1, 6), 5)
    torch.testing.assert_close(serving(variant)(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
