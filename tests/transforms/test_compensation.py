"""INT4 whose rounding is compensated for what a model's layers read: from the model alone, and never its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import starmap
from typing import Any

import pytest
import torch
from torch import nn

from autotune.errors import ChoiceError
from autotune.model import linear_layers
from autotune.runtime import kernels, own_texts
from autotune.runtime.kernels import compensated
from autotune.runtime.variant import Transform, Variant
from autotune.transforms import compensation
from autotune.transforms.linears import exchanged, reusing
from autotune.transforms.weight_only import WeightOnly
from autotune.tune import codec, fingerprint
from tests.models import CONTEXT, tiny, token_prompts
from tests.transforms.test_weights import AVX2

FORM = WeightOnly("decode", bits=4, rounding="compensated")
NEAREST = replace(FORM, rounding="")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def built() -> None:
    if reason := kernels.available():
        pytest.skip(reason)


def packed(variant: Variant) -> dict[str, dict[str, torch.Tensor]]:
    return {name: layer.packed for name, _, _, layer in exchanged(variant) if isinstance(layer, kernels.PackedLinear)}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(starmap(torch.equal, zip(one.values(), other.values(), strict=True)))


def divergence(variant: Variant) -> float:
    ids = torch.tensor(token_prompts(count=8, length=32, seed=5))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids).logits.double(), -1) for m in (variant.original, variant.modules["decode"]))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "phi3"])
def test_a_model_loses_less_and_the_original_nothing(architecture: str) -> None:
    model = tiny(architecture)
    before, state = fingerprint.of_model(model), torch.get_rng_state()
    variant = Variant(model).with_transform(FORM)
    assert fingerprint.of_model(model) == before
    assert torch.equal(torch.get_rng_state(), state), "a caller may be drawing from the process's generator"
    hooked = [m for each in (model, variant.modules["decode"]) for m in each.modules() if m._forward_pre_hooks]
    assert not hooked
    assert divergence(variant) < 0.95 * divergence(Variant(model).with_transform(NEAREST))


def test_a_plan_makes_the_same_weights_again() -> None:
    one = packed(Variant(tiny()).with_transforms([FORM]))
    kept = codec.decode(Transform, codec.loads(codec.dumps(FORM)), "plan")
    assert kept == FORM
    other = packed(Variant(tiny()).with_transforms([kept]))
    assert one.keys() == other.keys()
    assert all(same(one[name], other[name]) for name in one)
    assert not all(same(one[name], layer) for name, layer in packed(Variant(tiny()).with_transforms([NEAREST])).items())


def test_a_layer_does_not_depend_on_which_others_are_made() -> None:
    every = packed(Variant(tiny()).with_transform(FORM))
    some = packed(Variant(tiny()).with_transform(replace(FORM, skip="layers.0", wide="lm_head,down_proj")))
    assert {len(layer) for layer in some.values()} == {2, 3}  # INT8 has no zeros
    assert all(same(layer, every[name]) for name, layer in some.items() if len(layer) == 3)


def test_made_layers_are_reused_and_nothing_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Variant(tiny())
    with reusing():
        first = dict(packed(original.with_transform(FORM)))
        monkeypatch.setattr(own_texts, "written", lambda model: pytest.fail("it is read again"))
        second = packed(original.with_transform(replace(FORM, wide="lm_head")))
        assert all(second[name]["weight"] is first[name]["weight"] for name in first.keys() - {"lm_head"})


def test_layers_that_cannot_be_compensated_get_the_nearest_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensation, "MOST_INPUTS", 64)  # down_proj reads 96
    made, nearest = (packed(Variant(tiny()).with_transform(form)) for form in (FORM, NEAREST))
    alike = {name for name in made if same(made[name], nearest[name])}
    assert alike == {f"model.layers.{k}.mlp.down_proj" for k in range(2)}


def test_inputs_that_are_not_finite_leave_the_nearest_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensated, "moments", lambda inputs: torch.full((inputs.shape[-1],) * 2, torch.nan))
    made, nearest = (packed(Variant(tiny()).with_transform(form)) for form in (FORM, NEAREST))
    assert all(same(made[name], nearest[name]) for name in made)


@pytest.mark.fault("A2")
def test_a_failure_half_way_leaves_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    variant, before, make = Variant(model), fingerprint.of_model(model), kernels.Int4Linear.for_inputs
    done: list[nn.Linear] = []

    def fail_third(linear: nn.Linear, *given: Any) -> kernels.Int4Linear:
        if len(done) == 2:
            raise MemoryError("half-way")
        done.append(linear)
        return make(linear, *given)

    monkeypatch.setattr(kernels.Int4Linear, "for_inputs", fail_third)
    with pytest.raises(MemoryError, match="half-way"):
        variant.with_transform(FORM)
    assert fingerprint.of_model(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert set(variant.modules.values()) == {model}


def test_only_four_bits_are_compensated() -> None:
    with pytest.raises(ChoiceError, match="rounding"):
        WeightOnly(bits=8, rounding="compensated")
    with pytest.raises(ChoiceError, match="compensated"):
        WeightOnly(bits=4, rounding="compensate")
    assert FORM.wider == WeightOnly("decode", bits=8)


def test_what_it_takes_is_said_and_limited() -> None:
    original = Variant(tiny())
    assert FORM.extra_bytes(original) == NEAREST.extra_bytes(original) + 6 * 4 * 96**2
    assert FORM.unavailable(original, AVX2) is None
    slow = replace(AVX2, flops_per_s={"float32": 1e6})
    assert "takes" in (FORM.unavailable(original, slow) or "")
    assert NEAREST.unavailable(original, slow) is None
    assert FORM.unavailable(original, replace(AVX2, flops_per_s={})) is None, "a replay has no peaks"
    layer = nn.Linear(10, 100, bias=False)  # 4 T K N + 2 T K^2 + 2 K^3 + N K^2
    tokens = compensation.TOKENS
    assert compensation.flops([layer]) == 4 * tokens * 1000 + 2 * tokens * 100 + 2000 + 10_000


def test_texts_are_the_models_own_and_always_the_same() -> None:
    texts = own_texts.written(tiny())
    assert texts.shape == (own_texts.ROWS, own_texts.LENGTH)
    assert torch.equal(texts, own_texts.written(tiny()))
    assert not torch.equal(texts, own_texts.written(tiny(seed=1)))
    assert len({tuple(row.tolist()) for row in texts}) == own_texts.ROWS
    assert own_texts.written(tiny(max_position_embeddings=16)).shape == (own_texts.ROWS, 16)
    assert own_texts.LENGTH < CONTEXT


def test_every_layer_is_read_once_and_logits_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Variant(tiny()).edit("both")[0]
    layers: dict[str, Any] = {name: twin.get_submodule(name) for name in linear_layers.linears(twin)}
    monkeypatch.setattr(layers["lm_head"], "forward", lambda x: pytest.fail("logits are computed"))
    seen: list[tuple[str, tuple[int, ...]]] = []
    own_texts.read(
        twin, torch.ones(3, 5, dtype=torch.int64), layers, lambda name, x: seen.append((name, tuple(x.shape)))
    )
    assert sorted(name for name, _ in seen) == sorted(layers)
    assert {shape for _, shape in seen} == {(3, 5, 64), (3, 5, 96)}
