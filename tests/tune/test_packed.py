"""Packed weights that are kept between runs: read back to the bit, and never in place of others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autotune import workload
from autotune.machine import hardware
from autotune.runtime import kernels
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.int8_activations import Int8Activations
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.linears import LinearTransform, exchanged, reusing
from autotune.transforms.packed_prefill import PackedPrefill
from autotune.transforms.weight_only import WeightOnly
from autotune.transforms.weight_storage import WeightStorage
from autotune.tune import fingerprint, packed, policy, run, store, tensor_file
from autotune.tune.bench import LiveBench
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.packed import PackedWeights
from autotune.validate import Verdict
from tests.models import tiny, token_prompts
from tests.tune.test_tune import KEPT, QUALITY, latency

IDENTITY = Fingerprint("weights", "a processor", {"autotune": "1"}, "work", "policy", "strict")
INT8 = WeightOnly("decode", bits=8)
PLANS: dict[str, tuple[Transform, ...]] = {
    "INT8": (INT8,),
    "INT4, some wider": (WeightOnly("decode", bits=4, wide="lm_head,layers.1"),),
    "INT4, some at 6 bits": (WeightOnly("decode", bits=4, wide="lm_head,layers.1", wide_as="int6"),),
    "INT6": (WeightOnly("decode", bits=6),),
    "INT8, some wider": (WeightOnly("decode", bits=8, wide="down_proj"),),
    "INT4, compensated": (WeightOnly("decode", bits=4, rounding="compensated", wide="lm_head"),),
    "FP16": (WeightStorage("decode"),),
    **{
        f"{bits} bits, inputs of 8 in {phase}": (WeightOnly("both", bits=bits), Int8Activations(phase))
        for bits, phase in ((8, "prefill"), (8, "decode"), (4, "decode"))
        if kernels.available() is None and kernels.no_byte_unit(bits) is None
    },
    "beside others": (WeightOnly("decode", bits=4), PackedPrefill("prefill"), LeanLoop(phase="decode")),
}

pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")


@pytest.fixture(scope="module")
def original() -> Variant:
    return Variant(tiny("llama"))


@pytest.fixture
def path(original: Variant) -> Path:
    """Where the INT8 weights of the model are kept."""
    kept = PackedWeights(IDENTITY)
    kept.save(original.with_transform(INT8))
    found = kept.path((INT8,))
    assert found is not None
    assert found.exists()
    return found


def no_packing(*_: Any, **__: Any) -> None:
    pytest.fail("weights are packed again")


def layers(variant: Variant) -> dict[str, Any]:
    return {name: layer for name, _, _, layer in exchanged(variant)}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_layers_are_read_back_to_the_bit_and_not_packed_again(
    original: Variant, plan: tuple[Transform, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, made = PackedWeights(IDENTITY), original.with_transforms(plan)
    kept.save(made)
    found = kept.restore(original, plan)
    assert len(found) == len(layers(made)) == 15
    monkeypatch.setattr(LinearTransform, "_exchanged_lean", no_packing)
    with reusing(layers=found):
        again = original.with_transforms(plan)
    for name, layer in layers(made).items():
        other = layers(again)[name]
        assert type(other) is type(layer)
        assert other.packed.keys() == layer.packed.keys()
        assert all(torch.equal(other.packed[part], layer.packed[part]) for part in layer.packed)
    ids = torch.tensor(token_prompts(1))
    assert torch.equal(again.modules["decode"](ids).logits, made.modules["decode"](ids).logits)


def test_a_bias_is_the_models_own() -> None:
    original = Variant(tiny("llama", attention_bias=True))
    biased = {name for name, layer in layers(original.with_transform(INT8)).items() if layer.bias is not None}
    kept = PackedWeights(IDENTITY)
    kept.save(original.with_transform(INT8))
    with torch.no_grad(), reusing(layers=kept.restore(original, (INT8,))):
        again = layers(original.with_transform(INT8))
    assert {name for name, layer in again.items() if layer.bias is not None} == biased != set()
    assert all(torch.equal(again[name].bias, original.original.get_submodule(name).bias.float()) for name in biased)


OTHERS: dict[str, tuple[Fingerprint, tuple[Transform, ...]]] = {
    "another model": (replace(IDENTITY, model="others"), (INT8,)),
    "another release": (replace(IDENTITY, versions={"autotune": "2"}), (INT8,)),
    "another transform": (IDENTITY, (WeightOnly("decode", bits=4),)),
    "other layers": (IDENTITY, (WeightOnly("decode", bits=8, wide="lm_head"),)),
}


@pytest.mark.parametrize(("identity", "plan"), OTHERS.values(), ids=OTHERS.keys())
def test_other_weights_are_kept_elsewhere(
    original: Variant, path: Path, identity: Fingerprint, plan: tuple[Transform, ...]
) -> None:
    kept = PackedWeights(identity)
    assert kept.path(plan) != path
    assert kept.restore(original, plan) == {}
    assert path.exists()


def test_so_are_those_of_another_layout(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SCHEMA", packed.SCHEMA + 1)
    assert PackedWeights(IDENTITY).path((INT8,)) != path


def test_a_plan_on_another_processor_packs_the_same(path: Path) -> None:
    assert PackedWeights(replace(IDENTITY, hardware="another", workload="another")).path((INT8,)) == path


def test_a_plan_that_packs_nothing_keeps_nothing(original: Variant, own_cache: Path) -> None:
    kept, plan = PackedWeights(IDENTITY), (LeanLoop(phase="decode"),)
    kept.save(original.with_transforms(plan))
    assert kept.path(plan) is None
    assert kept.restore(original, plan) == {}
    assert not (own_cache / "packed").exists()


def flipped(content: bytes) -> bytes:
    return content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]


def renamed(content: bytes) -> bytes:
    return content.replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.no_proj")


TORN: dict[str, Callable[[bytes], bytes]] = {
    "a bit": flipped,
    "a name": renamed,
    "cut short": lambda content: content[:-1],
    "too long": lambda content: content + b"1",
    "empty": lambda content: b"",
    "no header": lambda content: b"12345678",
}


@pytest.mark.fault("F73")
@pytest.mark.parametrize("tear", TORN.values(), ids=TORN.keys())
def test_a_damaged_file_is_a_miss_and_removed(
    original: Variant, path: Path, tear: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "autotune")
    before = path.read_bytes()
    path.write_bytes(tear(before))
    assert path.read_bytes() != before
    assert PackedWeights(IDENTITY).restore(original, (INT8,)) == {}
    assert not path.exists()
    assert str(path) in caplog.text


@pytest.mark.fault("F73")
def test_so_is_one_with_layers_that_the_model_does_not_have(path: Path) -> None:
    """Its digest is right."""
    other = Variant(tiny("gpt2"))
    assert PackedWeights(IDENTITY).restore(other, (INT8,)) == {}
    assert not path.exists()


def test_a_file_of_somebody_else_is_not_read(original: Variant, path: Path) -> None:
    path.chmod(0o666)
    assert PackedWeights(IDENTITY).restore(original, (INT8,)) == {}


@pytest.mark.parametrize(
    ("most", "free", "is_kept"), [(1 << 30, 1 << 40, True), (1000, 1 << 40, False), (1 << 30, 1000, False)]
)
def test_weights_without_room_are_not_kept(
    original: Variant, path: Path, most: int, free: int, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.unlink()
    monkeypatch.setattr(packed, "MOST_BYTES", most)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    PackedWeights(IDENTITY).save(original.with_transform(INT8))
    assert path.exists() == is_kept


def test_a_file_that_could_not_be_read_back_is_not_written(
    original: Variant, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header of a model with many thousands of layers is longer than one that is read."""
    path.unlink()
    monkeypatch.setattr(tensor_file, "MOST_HEADER", 1000)
    PackedWeights(IDENTITY).save(original.with_transform(INT8))
    assert not path.exists()


def test_the_least_recently_used_make_room(original: Variant, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_BYTES", int(1.5 * path.stat().st_size))
    PackedWeights(replace(IDENTITY, model="another")).save(original.with_transform(INT8))
    assert not path.exists()
    assert len(list(path.parent.iterdir())) == 1


def test_what_is_kept_is_not_written_again(original: Variant, path: Path) -> None:
    before = path.stat().st_mtime_ns
    PackedWeights(IDENTITY).save(original.with_transform(INT8))
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("cache", [True, False])
def test_a_process_that_replays_a_plan_packs_once(
    cache: bool, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chosen = tiny("llama"), policy.load("balanced")
    work = workload.read(token_prompts(4), tokenizer=None, model=model)
    identity = fingerprint.of(model, hardware.identify(model), work, chosen, None)
    monkeypatch.setattr(LiveBench, "reverify", lambda self, variant: (QUALITY, latency(Verdict.PASS)))
    given = replace(KEPT, fingerprint=identity, transforms=(INT8,))
    packing, again = list[nn.Module](), kernels.Int8Linear.from_linear.__func__  # type: ignore[attr-defined]

    def counting(cls: type, linear: nn.Linear, **options: Any) -> nn.Module:
        packing.append(linear)
        made: nn.Module = again(cls, linear, **options)
        return made

    monkeypatch.setattr(kernels.Int8Linear, "from_linear", classmethod(counting))
    counts = []
    for _ in range(2):
        packing.clear()
        run.tune(model, work, chosen, cache=cache, plan=given)
        counts.append(len(packing))
    assert counts == ([15, 0] if cache else [15, 15])
    assert (own_cache / "packed").exists() == cache
    assert store.find(identity) is None  # a plan that was given is the caller's to keep
