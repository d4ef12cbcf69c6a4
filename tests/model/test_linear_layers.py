"""Which linear layers a model has, and how one is exchanged for another."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module  # type: ignore[import-untyped]
from torch import nn
from transformers.pytorch_utils import Conv1D

from autotune.model import linear_layers, placement
from autotune.model.twins import fork
from tests import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Doubling(linear_layers.Replacement):
    """Twice the layer it stands in for."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, weight_bytes=7, form="doubled")
        self.linear = (linear,)  # in a tuple, out of sight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.linear[0](x)


@pytest.mark.parametrize(
    ("architecture", "per_layer", "others"),
    [
        ("llama", 7, {"lm_head"}),
        ("gpt2", 4, {"lm_head"}),  # Conv1D
        ("opt", 6, {"lm_head"}),
        ("phi3", 4, {"lm_head"}),
        ("mixtral", 4, {"lm_head"}),  # experts are 3-D parameters, the router is no layer
        ("mamba", 1, set()),  # of x_proj, dt_proj, out_proj and lm_head the model reads the weight
    ],
)
def test_linear_layers(architecture: str, per_layer: int, others: set[str]) -> None:
    found = linear_layers.linears(models.tiny(architecture))
    assert len(found) == 2 * per_layer + len(others)
    assert others <= found.keys()
    assert all(layer.in_features > 0 and layer.weight.dim() == 2 for layer in found.values())


@pytest.mark.parametrize(
    ("skip", "left_out"),
    [
        ("", set()),
        ("lm_head", {"lm_head"}),
        ("down_proj, lm_head", {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        ("proj", set()),  # a part of a name is a whole one
    ],
)
def test_skipped_by_name(skip: str, left_out: set[str], llama: PreTrainedModel) -> None:
    assert linear_layers.linears(llama).keys() - linear_layers.linears(llama, skip).keys() == left_out


@pytest.mark.fault("A28")
def test_conv1d_is_seen_as_linear_over_the_same_memory() -> None:
    conv, x = Conv1D(24, 16), torch.randn(3, 16)
    linear = linear_layers.as_linear(conv)
    assert linear is not None
    assert (linear.in_features, linear.out_features) == (16, 24)
    assert linear.weight.data_ptr() == conv.weight.data_ptr()
    torch.testing.assert_close(linear(x), conv(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(4, 4),
        nn.LayerNorm(4),
        nn.Conv1d(4, 4, 1),
        type("Scaled", (nn.Linear,), {"forward": lambda self, x: x})(4, 4),
    ],
    ids=["embedding", "norm", "convolution", "own-forward"],
)
def test_other_layers_are_not_linear(layer: nn.Module) -> None:
    assert linear_layers.as_linear(layer) is None


@pytest.mark.fault("A28")
@pytest.mark.parametrize("hooked", ["not", "before", "after"])
def test_a_layer_with_a_patched_forward_is_left_alone(llama: PreTrainedModel, hooked: str) -> None:
    if hooked == "before":
        add_hook_to_module(llama.lm_head, AlignDevicesHook(io_same_device=True))
    forward = llama.lm_head.forward
    llama.lm_head.forward = lambda x: forward(x)
    if hooked == "after":
        add_hook_to_module(llama.lm_head, AlignDevicesHook(io_same_device=True))
    assert "lm_head" not in linear_layers.linears(llama)
    assert linear_layers.replace(fork(llama), Doubling) == 14


def test_a_layer_with_a_hook_of_accelerates_is_none_with_a_patched_forward(llama: PreTrainedModel) -> None:
    add_hook_to_module(llama.lm_head, AlignDevicesHook(io_same_device=True))
    assert "lm_head" in linear_layers.linears(llama)
    assert "lm_head" in linear_layers.linears(fork(llama))


def test_a_bare_hook_of_accelerates_says_nothing_of_devices(llama: PreTrainedModel) -> None:
    add_hook_to_module(llama.lm_head, ModelHook())
    assert placement.one_device(llama) is None
    assert placement.obstacle(llama) is None


def test_a_layer_with_hooks_is_left_alone(llama: PreTrainedModel) -> None:
    llama.lm_head.register_forward_hook(lambda *_: None)
    assert "lm_head" not in linear_layers.linears(llama)


def test_exchange_in_a_twin(llama: PreTrainedModel) -> None:
    twin = fork(llama)
    assert linear_layers.replace(twin, Doubling, skip="q_proj") == 13
    assert linear_layers.count(twin, Doubling) == 13
    assert linear_layers.count(llama, Doubling) == 0
    assert linear_layers.linears(twin).keys() == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    x = torch.randn(1, 64)
    torch.testing.assert_close(twin.lm_head(x), 2 * llama.lm_head(x))


def test_a_layer_under_two_names_is_exchanged_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared, "three": Conv1D(4, 4)})
    model["four"] = model["three"]
    assert linear_layers.replace(model, Doubling) == 2
    assert model["one"] is model["two"]
    assert model["three"] is model["four"]
    assert isinstance(model["one"], Doubling)


def test_none_leaves_a_layer(llama: PreTrainedModel) -> None:
    twin = fork(llama)
    assert linear_layers.replace(twin, lambda linear: None) == 0
    assert linear_layers.linears(twin).keys() == linear_layers.linears(llama).keys()


def test_copies_share_a_replacement(llama: PreTrainedModel) -> None:
    twin = fork(llama)
    linear_layers.replace(twin, Doubling)
    assert copy.deepcopy(twin).lm_head is twin.lm_head


def test_bytes_stored_count_what_is_shared_once(llama: PreTrainedModel) -> None:
    alone = linear_layers.stored_bytes(llama)
    parameters = {p.data_ptr(): p.nbytes for p in llama.parameters()}
    assert alone >= sum(parameters.values())
    twin = fork(llama)
    assert linear_layers.stored_bytes(llama, twin) == alone
    linear_layers.replace(twin, Doubling)
    assert linear_layers.stored_bytes(llama, twin) == alone + 15 * 7


@pytest.mark.fault("A28")
def test_obstacles(llama: PreTrainedModel) -> None:
    assert linear_layers.obstacle(llama) is None
    assert "meta" in (linear_layers.obstacle(models.tiny("llama").to("meta")) or "")
    quantised: Any = models.tiny("llama")
    quantised.hf_quantizer = object()
    assert "quantised" in (linear_layers.obstacle(quantised) or "")
