"""Decoder layers in two operators: their numbers are those of the layers' modules, which compute where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from autotune.model import seam
from autotune.runtime import fused_decoder, fused_stack, kernels
from autotune.runtime.fused_decoder import FUSED
from autotune.runtime.kernels.bf16 import FEW
from autotune.runtime.variant import Variant
from autotune.transforms import make
from tests import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPERATORS = kernels.available()
pytestmark = pytest.mark.skipif(OPERATORS is not None, reason=str(OPERATORS))

LAYERS = 2
ATTENTION, FUSE = make("prefill_attention", {}, "prefill"), make("fused_layers", {}, "prefill")
PACKED, NARROW = make("packed_prefill", {}, "prefill"), make("int8_activations", {}, "prefill")
INT8, INT4 = (make("weight_only", {"bits": bits}, "decode") for bits in (8, 4))
WEIGHTS = {  # the transforms of prefill's weights, before and after the layers are fused
    "INT8": ([INT8, PACKED], []),
    "INT4": ([INT4, PACKED], []),
    "INT6": ([make("weight_only", {"bits": 6}, "decode"), PACKED], []),
    "INT4, some INT8": ([make("weight_only", {"bits": 4, "wide": "v_proj,up_proj,o_proj"}, "decode"), PACKED], []),
    "INT8, 8 bits": ([INT8, PACKED], [NARROW]),
    "INT4, 8 bits": ([INT4, PACKED], [NARROW]),
    "FP16": ([make("weight_storage", {"dtype": "float16"}, "decode"), PACKED], []),
    "FP32 of BF16": ([make("weight_storage", {"dtype": "bfloat16"}, "decode"), PACKED], []),
    "BF16": ([INT8, make("linear_bf16", {"weights": "decode"}, "prefill")], []),
    "BF16, plain": ([make("linear_bf16", {}, "prefill")], []),
    "BF16 in two parts": ([make("linear_bf16x3", {}, "prefill")], []),
}


@pytest.fixture(autouse=True)
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer computes itself; for all of them in one operator see `test_fused_stack.py`."""
    monkeypatch.setattr(fused_stack, "MOST_TOKENS", 0)


def missing(weights: str) -> str | None:
    """Why this processor does not multiply so."""
    if weights.startswith("FP"):
        return None
    if weights.startswith("BF16"):
        return kernels.no_bf16_unit()
    if not torch.ops.autotune.least_digits(8):
        return "no products in integers"
    if weights.endswith("8 bits"):
        return kernels.no_byte_unit(int(weights[3]))
    return None


def prefill(model: PreTrainedModel, weights: str = "INT8") -> PreTrainedModel:
    """A model's prefill with such weights and fused layers."""
    if reason := missing(weights):
        pytest.skip(reason)
    before, after = WEIGHTS[weights]
    module: PreTrainedModel = Variant(model).with_transforms([*before, ATTENTION, FUSE, *after]).modules["prefill"]
    assert sum(hasattr(m.__dict__.get("forward"), FUSED) for m in module.modules()) == LAYERS
    return module


def run(module: PreTrainedModel, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The logits, and keys and values of every layer."""
    cache = seam.growing_cache()
    with torch.no_grad():
        logits = module(**given, **seam.over(module, cache)).logits
    return [logits, *(held for pair in seam.keys_and_values(cache) for held in pair)]


def require_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


def operators(call: Callable[[], Any]) -> dict[str, int]:
    """How often a call ran each of the operators."""
    with torch.profiler.profile() as watched:
        call()
    return {event.key.removeprefix("autotune::"): event.count for event in watched.key_averages()}


def by_modules(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The result of a call whose layers are computed by their modules."""
    with monkeypatch.context() as patch:
        patch.setattr(fused_decoder.LayerParts, "products", lambda self, tokens: None)
        return call()


BATCHES = {
    "one token": {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1, dtype=torch.int64)},
    "a prompt": models.left_padded((70,)),
    "a batch with padding": models.left_padded((9, 33, 30)),
    "many": models.left_padded((40, 33, 40)),
}


@pytest.mark.parametrize("given", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_numbers_are_those_of_the_modules(
    weights: str, given: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = prefill(models.tiny(), weights)
    require_same(run(module, given), by_modules(lambda: run(module, given), monkeypatch))
    tokens, bf16 = given["input_ids"].numel(), weights.startswith("BF16")
    few = tokens < FEW  # for products in BF16
    suffix = "_floats" if weights.startswith("FP") else "" if bf16 and not few else "_rounded"
    expected_runs = 0 if bf16 and few and weights != "BF16" else LAYERS  # plain weights are not multiplied in integers
    counts = operators(lambda: run(module, given))
    assert [counts.get(f"layer_{name}{suffix}", 0) for name in ("heads", "end")] == [expected_runs] * 2


FORMS: list[tuple[str, dict[str, Any]]] = [  # architectures, and changes of their configurations
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("mistral-window", {}),
]


def drawn(architecture: str, changes: dict[str, Any]) -> PreTrainedModel:
    """A model whose biases and norms are random, too."""
    model = models.tiny(architecture, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize(("architecture", "changes"), FORMS)
@pytest.mark.parametrize("weights", ["INT8", "BF16", "FP16"])
def test_architectures(
    architecture: str, changes: dict[str, Any], weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = drawn(architecture, changes)
    module = prefill(model, weights)
    given = models.left_padded((50, 37))
    name = {"BF16": "layer_end", "INT8": "layer_end_rounded", "FP16": "layer_end_floats"}[weights]
    assert operators(lambda: run(module, given))[name] == LAYERS
    got = run(module, given)
    require_same(got, by_modules(lambda: run(module, given), monkeypatch))
    right = model(**given).logits[given["attention_mask"].bool()]
    assert (got[0][given["attention_mask"].bool()] - right).norm() <= 0.05 * right.norm()


def test_a_prompt_in_parts_is_the_whole_prompt() -> None:
    module = prefill(models.tiny())
    ids = torch.tensor(models.token_prompts(1, length=70))
    parts, whole = seam.growing_cache(), seam.growing_cache()
    with torch.no_grad():
        for part in ids.split(32, 1):
            got = module(input_ids=part, **seam.over(module, parts)).logits[:, -1]
        expected = module(input_ids=ids, **seam.over(module, whole)).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def hooked(module: PreTrainedModel) -> None:
    module.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: None)


def exchanged(module: PreTrainedModel) -> None:
    layer = module.model.layers[0]
    layer.mlp.down_proj = torch.nn.Linear(96, 64, bias=False).requires_grad_(False)


def in_training(module: PreTrainedModel) -> None:
    module.model.layers[0].self_attn.train()


def other_norm(module: PreTrainedModel) -> None:
    module.model.layers[0].input_layernorm = torch.nn.RMSNorm(64)


def other_block(module: PreTrainedModel) -> None:
    module.model.layers[0].mlp = torch.nn.Linear(64, 64)


@pytest.mark.parametrize("change", [hooked, exchanged, in_training, other_norm, other_block])
def test_layers_that_changed_are_computed_by_their_modules(
    change: Callable[[PreTrainedModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = prefill(models.tiny())
    change(module)
    given = BATCHES["a prompt"]
    assert operators(lambda: run(module, given))["layer_end_rounded"] == LAYERS - 1
    require_same(run(module, given), by_modules(lambda: run(module, given), monkeypatch))


def test_attentions_and_hidden_states_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny(attn_implementation="eager")
    module = Variant(model).with_transforms([INT8, PACKED, FUSE]).modules["prefill"]
    given = BATCHES["a prompt"] | {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        got, expected = module(**given), by_modules(lambda: module(**given), monkeypatch)
    assert len(got.attentions) == LAYERS
    assert len(got.hidden_states) == LAYERS + 1
    pairs = zip((*got.attentions, *got.hidden_states), (*expected.attentions, *expected.hidden_states), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_caches_that_ask_for_more_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer passes positions or its own arguments to caches that are not plain growing ones."""
    model = models.tiny()
    module = prefill(model)
    given = BATCHES["a prompt"]

    def answer() -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=96)
        with torch.no_grad():
            logits: torch.Tensor = module(**given, **seam.over(module, cache)).logits
        return logits

    assert "layer_end_rounded" not in operators(answer)
    assert torch.equal(answer(), by_modules(answer, monkeypatch))


class Pair(torch.nn.Module):
    """A decoder layer's forward that returns a tuple, as many did in older releases."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__.update(vars(layer))
        self.own = (type(layer).forward,)

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor]:
        return (self.own[0](self, hidden_states, **given),)


def test_a_layer_that_returns_a_tuple_is_left() -> None:
    module = prefill(models.tiny())
    layer = module.model.layers[0]
    del layer.__dict__["forward"]
    assert fused_decoder.fused_forward(layer) is not None
    assert fused_decoder.fused_forward(Pair(layer)) is None


def test_a_layer_that_computes_something_else_is_left() -> None:
    sizes = models.ARCHITECTURES["llama"][1] | {"residual_multiplier": 0.5}
    config = transformers.GraniteConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    module = Variant(model).with_transforms([ATTENTION, FUSE]).modules["prefill"]
    assert not any(hasattr(m.__dict__.get("forward"), FUSED) for m in module.modules())
