"""The original parked in the host's memory, and a device that dies: on a GPU made of CPU tensors."""

from __future__ import annotations

import copy
import gc
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autotune
from autotune.live.original import Original
from autotune.machine import device
from autotune.runtime.kernels import available
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.static_cache import StaticCache
from autotune.transforms.weight_only import WeightOnly
from autotune.tune import plan as plans
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.tuned import Tuned
from tests.fakes.cuda import FakeCuda
from tests.live.test_release import Written, greedy, storages, wrapped
from tests.models import tiny, token_prompts

SENTENCE = available()
pytestmark = pytest.mark.skipif(SENTENCE is not None, reason=str(SENTENCE))

PACKED: list[Transform] = [WeightOnly(bits=8), StaticCache(slots=128)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A GPU on which tuning always ends with INT8 weights over slots."""

    def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        variant = Variant(model, traffic, workload).with_transforms(PACKED)
        none = Fingerprint("", "", {}, "", "", "strict")
        return Tuned(variant, plans.Plan(none, variant.transforms), Written(), "won")

    monkeypatch.setattr(tuning, "tune", tune)
    fake = FakeCuda()
    with device.stand_in(fake):
        yield fake


def parked(model: Any) -> Any:
    model = wrapped(model)
    model.autotune.commit(keep_original="parked")
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox", "opt"])
def test_parked_it_answers_as_the_plan_and_brought_back_it_is_what_it_was(gpu: FakeCuda, architecture: str) -> None:
    model = tiny(architecture)
    answer, weights, where = greedy(model), copy.deepcopy(model.state_dict()), storages(model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model = wrapped(model)
    tuned = greedy(model)
    model.autotune.commit(keep_original="parked")
    assert model.autotune.status.original == "parked"
    assert greedy(model) == tuned
    assert len(greedy(model, num_beams=2)[0]) == len(tuned[0]), "what the plan cannot serve is not served"
    assert model.autotune._serving.original.parked_bytes > 0

    model.autotune.rollback()
    assert model.autotune.status.original == "resident"
    assert greedy(model) == answer
    assert storages(model) != where, "nothing was ever moved"
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    state = model.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[name], weights[name]) for name in weights)

    model.autotune.commit()
    assert greedy(model) == tuned, "the plan is lost though there was room for it"


@pytest.mark.parametrize(
    "ask",
    [lambda m: m.autotune.tune(), lambda m: m.autotune.unwrap(), lambda m: autotune.wrap(m)],
    ids=["tune", "unwrap", "wrap"],
)
def test_whatever_needs_the_original_brings_it_back(gpu: FakeCuda, ask: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    expected = copy.deepcopy(model.state_dict())
    parked(model)
    with pytest.raises(autotune.StateError, match=r"parked; call .autotune.rollback"):
        model.save_pretrained(tmp_path)
    ask(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_without_room_for_both_the_plan_makes_way(gpu: FakeCuda) -> None:
    model = tiny("llama")
    answer = greedy(model)
    plan = weakref.ref(parked(model).autotune._winner.tuned.variant)
    gpu.free_bytes = 1000
    model.autotune.rollback()
    gc.collect()
    assert plan() is None, "it still takes the room"
    assert greedy(model) == answer
    assert model.autotune.plan is None
    assert "there was no room to bring the original back" in model.autotune.status.detail
    assert gpu.trims
    with pytest.raises(autotune.StateError, match=r"call .tune"):
        model.autotune.commit()


def test_room_that_turns_out_to_be_none_makes_the_plan_make_way(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an allocator counts as free may lie in pieces, or beyond the share that the process may take."""
    model, plain, restore = parked(tiny("llama")), tiny("llama"), Original.restore

    def restored(original: Original) -> None:
        if model.autotune.active is not None and model.autotune.active.transforms:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        restore(original)

    monkeypatch.setattr(Original, "restore", restored)
    model.autotune.rollback()
    assert model.autotune.status.state == "original"
    assert "no room to bring the original back" in model.autotune.status.detail
    assert model.autotune.status.original == "resident"
    assert greedy(model) == greedy(plain)


@pytest.mark.parametrize("edited", [False, True], ids=["no room", "edited"])
@pytest.mark.parametrize("ask", ["rollback", "tune", "unwrap"])
def test_what_cannot_be_brought_back_now_is_brought_back_later(
    gpu: FakeCuda, ask: str, edited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    answer, weights = greedy(model), copy.deepcopy(model.state_dict())
    handle = parked(model).autotune
    layer, restore, found = weakref.ref(model.model.layers[0].mlp.down_proj), Original.restore, list[bool]()

    def no_room(original: Original) -> None:
        found.append(layer() is None)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if edited:
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.scales.mul_(2)
    monkeypatch.setattr(Original, "restore", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        handle.rollback()
    assert found == ([True] if edited else [False, True]), "the plan's layers still took the room"
    assert (handle.status.state, handle.status.original, handle.plan) == ("original", "parked", None)
    with pytest.raises(autotune.StateError, match=r"parked; call .autotune.rollback\(\) first"):
        greedy(model)
    with pytest.raises(autotune.StateError, match=r"parked; call .autotune.rollback"):
        model.state_dict()

    monkeypatch.setattr(Original, "restore", restore)
    asking = threading.Thread(target=getattr(handle, ask), daemon=True)
    asking.start()
    asking.join(60)
    assert not asking.is_alive()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    if ask == "rollback":
        assert handle.status.state == "original"
        assert "the plan was dropped" in handle.status.detail
    if ask != "tune":
        assert greedy(model) == answer


def test_training_mode_while_the_original_was_parked_costs_no_plan(gpu: FakeCuda) -> None:
    model = parked(tiny("llama"))
    tuned = greedy(model)
    model.train()
    model.autotune.rollback()
    assert all(module.training for module in model.modules()), "the original's layers were not there to be switched"
    model.eval()
    model.autotune.commit()
    assert greedy(model) == tuned
    modules = model.autotune._winner.tuned.variant.modules.values()
    assert not [each for module in modules for each in module.modules() if each.training]


def test_a_plan_that_was_edited_while_the_original_was_parked_is_dropped(gpu: FakeCuda) -> None:
    """Brought back, the original is what it was; the plan is another one than was tuned."""
    model = tiny("llama")
    answer = greedy(model)
    parked(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.scales.mul_(2)
    model.autotune.rollback()
    assert greedy(model) == answer
    assert model.autotune.plan is None
    assert model.autotune.status.state == "original"
    assert "the plan was dropped: the model changed while the original was parked" in model.autotune.status.detail
    with pytest.raises(autotune.StateError, match=r"call .tune"):
        model.autotune.commit()


def test_parked_then_released(gpu: FakeCuda) -> None:
    model = parked(tiny("llama"))
    tuned = greedy(model)
    model.autotune.commit(keep_original=False)
    assert model.autotune.status.original == "released"
    assert greedy(model) == tuned
    with pytest.raises(autotune.StateError, match="cannot roll back"):
        model.autotune.rollback()


@pytest.mark.parametrize("when", ["background", "blocking"])
def test_no_room_to_park_is_no_failure_of_tuning(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def no_room(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("autotune.live.original.relocate", no_room)
    model = wrapped(tiny("llama"), when=when, keep_original="parked")
    if when == "background":
        model.autotune._tuning.thread.join(60)
    assert (model.autotune.status.state, model.autotune.status.original) == ("tuned", "resident")


def test_on_a_cpu_there_is_nowhere_to_park() -> None:
    with pytest.raises(ValueError, match="where this model is already"):
        wrapped(tiny("llama"), keep_original="parked")


@pytest.mark.parametrize("typo", ["park", "Parked", "true", None, 0, 1])
def test_what_is_not_quite_a_place_releases_nothing(gpu: FakeCuda, typo: Any) -> None:
    said = re.escape(f"must be True, False or 'parked', not {typo!r}")
    with pytest.raises(ValueError, match=said):
        wrapped(tiny("llama"), keep_original=typo)
    model = wrapped(tiny("llama"))
    with pytest.raises(ValueError, match=said):
        model.autotune.commit(keep_original=typo)
    assert model.autotune.status.original == "resident"


@pytest.mark.parametrize("refused", ["workload", "under way", "plan"])
def test_what_is_refused_takes_no_plan_out(gpu: FakeCuda, refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parked(tiny("llama"))
    tuned = greedy(model)
    if refused == "workload":
        with pytest.raises(autotune.WorkloadError):
            model.autotune.tune(workload=[])
    elif refused == "under way":
        with model.autotune._tuning.lock, pytest.raises(autotune.StateError, match="under way"):
            model.autotune.tune()
    else:
        with pytest.raises(autotune.PlanError):
            model.autotune.adopt(plans.Plan(Fingerprint("another", "", {}, "", "", "strict"), ()))
    status = model.autotune.status
    assert (status.state, len(status.transforms)) == ("tuned", len(PACKED))
    assert status.original == ("resident" if refused == "plan" else "parked")
    assert greedy(model) == tuned


@pytest.mark.parametrize("place", ["parked", False])
def test_memory_that_runs_out_leaves_the_original_as_it_was(
    gpu: FakeCuda, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    answer, weights = greedy(model), copy.deepcopy(model.state_dict())
    model = wrapped(model)
    tuned = greedy(model)
    with monkeypatch.context() as full:

        def no_room(*_: Any) -> None:
            raise MemoryError

        full.setattr("autotune.live.original.relocate", no_room)
        with pytest.raises(MemoryError):
            model.autotune.commit(keep_original=place)
    assert model.autotune.status.original == "resident"
    assert greedy(model) == tuned
    model.autotune.rollback()
    assert greedy(model) == answer
    assert all(torch.equal(value, weights[name]) for name, value in model.autotune.unwrap().state_dict().items())


DEATH = "CUDA error: device-side assert triggered"


@pytest.mark.fault("A22", "E71")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_device_that_dies_is_not_tried_again(gpu: FakeCuda, phase: str) -> None:
    model = wrapped(tiny("llama"))
    calls = list[str]()

    def die(*_: Any, **__: Any) -> Any:
        calls.append(phase)
        raise torch.AcceleratorError(DEATH)

    model.autotune._serving.active.modules[phase].forward = die
    for _ in range(3):
        with pytest.raises(autotune.DeviceError, match=r"device-side assert triggered.*restart the process"):
            greedy(model)
    with pytest.raises(autotune.DeviceError, match="restart the process"), torch.no_grad():
        model(torch.tensor([[1, 2]]))
    assert calls == [phase], "it was tried again"
    assert model.autotune.status.state == "failed"
    assert "restart the process" in model.autotune.status.detail


def test_a_batch_that_a_plan_has_no_memory_for_is_the_originals(gpu: FakeCuda) -> None:
    model = tiny("llama")
    answer = greedy(model)
    wrapped(model)

    def exhaust(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.autotune._serving.active.modules["decode"].forward = exhaust
    trims = gpu.trims
    with pytest.warns(RuntimeWarning, match="out of memory.*; the original serves for such calls"):
        assert greedy(model) == answer
    assert gpu.trims == trims + 1
    assert greedy(model) == answer
    assert model.autotune.status.state == "tuned", "other batches are not concerned"
    assert not model.autotune.events


def test_a_dead_device_ends_tuning_with_one_sentence(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(*_: Any, **__: Any) -> Any:
        raise gpu.mark_dead(torch.AcceleratorError(DEATH))

    monkeypatch.setattr(tuning, "tune", tune)
    model = tiny("llama")
    with pytest.raises(autotune.DeviceError, match="restart the process"):
        autotune.wrap(model, workload=token_prompts(4), when="blocking", cache=False)
