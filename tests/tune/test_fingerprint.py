"""Fingerprints: the same for the same thing, different for any difference that matters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from torch import nn

from autotune.errors import UnsupportedModelError
from autotune.machine.hardware import Hardware
from autotune.model import route
from autotune.model.twins import fork
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.tune import fingerprint
from autotune.tune.policy import Choice, Policy, PolicyStep
from autotune.validate.limits import Limits
from autotune.workload import Workload
from tests import models

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

HARDWARE = Hardware("cpu", "Some CPU", "AVX2", 2, 1 << 30, 1e10, {"float32": 1e11}, None, {"torch": "2.13.0"})
WORKLOAD = Workload(((5,) * 64,), new_tokens=64)
POLICY = Policy(
    name="mine",
    description="",
    objective="latency",
    tier="strict",
    limits=Limits(),
    budget_s=60,
    steps=(PolicyStep("s", "decode", (Choice("threads", {"count": 1}),), frozenset({"memory", "mixed"})),),
)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_the_same_model_has_the_same_fingerprint(name: str, tmp_path: Path) -> None:
    model = models.tiny(name)
    first = fingerprint.of_model(model)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    twins = [model, models.tiny(name), reloaded, copy.deepcopy(model), fork(model)]
    assert {fingerprint.of_model(twin) for twin in twins} == {first}
    assert fingerprint.of_model(models.tiny(name, seed=1)) != first


def test_a_routed_model_has_the_fingerprint_of_the_bare_one(llama: PreTrainedModel) -> None:
    routed = serving(Variant(llama))
    assert route.is_routed(routed)
    assert fingerprint.of_model(routed) == fingerprint.of_model(llama)


def test_the_model_is_only_read(llama: PreTrainedModel) -> None:
    before = {name: (tensor._version, tensor.clone()) for name, tensor in llama.state_dict().items()}
    threads = torch.get_num_threads()
    fingerprint.of_model(llama)
    for name, tensor in llama.state_dict().items():
        assert tensor._version == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert torch.get_num_threads() == threads


def _nudge(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.weight.view(-1).view(torch.int32)[17] ^= 1  # the lowest bit of one weight


def _swap_rows(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight[[3, 4]] = weight[[4, 3]]


def _swap_layers(model: PreTrainedModel) -> None:
    first, second = model.model.layers
    first.mlp.up_proj.weight, second.mlp.up_proj.weight = second.mlp.up_proj.weight, first.mlp.up_proj.weight


def _change_buffer(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq[0] *= 2


def _untie(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())


def _change_config(model: PreTrainedModel) -> None:
    model.config.rms_norm_eps *= 10


def _change_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    "change",
    [
        _nudge,
        _swap_rows,
        _swap_layers,
        _change_buffer,
        _untie,
        _change_config,
        _change_attention,
        lambda model: model.to(torch.bfloat16),
        lambda model: model.add_module("adapter", nn.Linear(2, 2)),
    ],
    ids=["bit", "rows", "layers", "buffer", "tie", "config", "attention", "dtype", "adapter"],
)
def test_any_difference_shows(llama: PreTrainedModel, change: Callable[[Any], Any]) -> None:
    before = fingerprint.of_model(llama)
    with torch.no_grad():
        change(llama)
    assert fingerprint.of_model(llama) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.set_adapter(["b"]),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.enable_adapters(False),
    ],
    ids=["another", "scaled", "off"],
)
def test_which_adapter_counts_and_how_much_shows(llama: PreTrainedModel, change: Callable[[Any], Any]) -> None:
    for name in "ab":
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), llama, name)
    layers = [module for module in llama.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.set_adapter(["a"])
    before = fingerprint.of_model(llama)
    assert fingerprint.of_model(llama) == before
    change(layers[0])
    assert fingerprint.of_model(llama) != before


def test_paths_do_not_count(llama: PreTrainedModel) -> None:
    before = fingerprint.of_model(llama)
    llama.config._name_or_path = "/elsewhere"
    llama.config.transformers_version = "9.9"
    assert fingerprint.of_model(llama) == before


BIG = 3 * 8 * fingerprint.COLUMNS  # bytes of three rows of the grid


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(()),
        torch.empty(0),
        torch.randn(3, 5),
        torch.randn(3, 5, dtype=torch.complex64),
        torch.randint(0, 2, (BIG + 5,), dtype=torch.bool),
        torch.randn(BIG // 4 + 3),
        torch.randn(BIG // 2 + 1, dtype=torch.bfloat16),
        torch.randn(BIG // 2 + 1).to(torch.float8_e4m3fn),
        torch.randint(-128, 127, (BIG + 3,), dtype=torch.int8)[1:],
        torch.randn(256, 512).T,
        torch.randn(1, 512).expand(256, 512),
    ],
    ids=["scalar", "empty", "small", "complex", "bool", "float32", "bf16", "fp8", "unaligned", "strided", "expanded"],
)
def test_every_kind_of_tensor_is_read(tensor: torch.Tensor) -> None:
    def content(of: torch.Tensor) -> list[bytes]:
        return list(fingerprint.content("it", of))

    assert content(tensor) == content(tensor.clone())
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    for position in {0, raw.numel() // 2, raw.numel() - 1} if raw.numel() else ():
        other = raw.clone()
        other[position] ^= 1
        assert content(other) != content(raw)


def test_moved_blocks_show() -> None:
    grid = torch.arange(3 * fingerprint.COLUMNS).view(3, -1)
    moved = (grid.roll(1, 0), grid.roll(1, 1), grid.flip(0), grid.flip(1))
    contents = {tuple(fingerprint.content("it", m.contiguous())) for m in (grid, *moved)}
    assert len(contents) == 5


def test_weights_that_cannot_be_read_are_refused() -> None:
    with torch.device("meta"):
        model = models.tiny()
    with pytest.raises(UnsupportedModelError, match="load the model fully"):
        fingerprint.of_model(model)


@pytest.mark.parametrize(
    ("part", "change", "field"),
    [
        ("hardware", {"name": "Another CPU"}, "hardware"),
        ("hardware", {"capability": "AVX512"}, "hardware"),
        ("hardware", {"threads": 4}, "hardware"),
        ("hardware", {"versions": {"torch": "2.14.0"}}, "versions"),
        ("workload", {"new_tokens": 256}, "workload"),
        ("policy", {"name": "other"}, "policy"),
        ("policy", {"budget_s": 61}, "policy"),
        ("policy", {"limits": Limits(min_gain=0.04)}, "policy"),
        ("policy", {"steps": ()}, "policy"),
        ("policy", {"tier": "relaxed"}, "tier"),
    ],
)
def test_each_part_shows(llama: PreTrainedModel, part: str, change: dict[str, Any], field: str) -> None:
    parts: dict[str, Any] = {"hardware": HARDWARE, "workload": WORKLOAD, "policy": POLICY}
    base = fingerprint.of(llama, **parts)
    other = fingerprint.of(llama, **(parts | {part: replace(parts[part], **change)}))
    assert getattr(base, field) != getattr(other, field)
    same = {"policy": base.policy, field: getattr(base, field)}  # the tier belongs to the policy too
    assert replace(other, **same) == base


def test_what_varies_from_run_to_run_does_not_show(llama: PreTrainedModel) -> None:
    base = fingerprint.of(llama, HARDWARE, WORKLOAD, POLICY)
    measured = replace(HARDWARE, bandwidth_bytes_per_s=2e10, flops_per_s={"float32": 2e11})
    moved = replace(POLICY, source="/elsewhere/mine.toml")
    assert fingerprint.of(llama, measured, WORKLOAD, moved) == base
    steps = pickle.loads(pickle.dumps(POLICY.steps))
    reordered = replace(steps[0], bottlenecks=frozenset(["mixed", "memory"]))
    assert fingerprint.of(llama, HARDWARE, WORKLOAD, replace(POLICY, steps=(reordered,))) == base
