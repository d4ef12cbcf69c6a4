"""Prefill compiled with dynamic shapes, on the CPU: what it computes, how often it is compiled, when it gives up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autotune.errors import ChoiceError, TransformError
from autotune.machine.hardware import Hardware
from autotune.model.twins import fork
from autotune.runtime.dispatch import serving
from autotune.runtime.steps import compiled_prefill
from autotune.runtime.steps.compiled_prefill import Recompiling
from autotune.runtime.variant import Variant
from autotune.transforms.compile_prefill import CompilePrefill
from autotune.transforms.static_cache import StaticCache
from tests.models import left_padded, tiny, token_prompts

PLAN = CompilePrefill(phase="prefill")
CPU = Hardware("cpu", "test", "AVX2", 1, 2**34, 25e9, {"float32": 1e11}, "g++", {})


def forward_of(variant: Variant) -> Recompiling:
    forward = vars(variant.modules["prefill"])["forward"]
    assert isinstance(forward, Recompiling)
    return forward


def test_a_twin_computes_with_its_own_modules() -> None:
    """The compiled forward runs the module that it was made for, whoever calls it."""
    twin = fork(tiny("llama"))
    twin.forward = Recompiling(twin)
    twin.forward.given_up = "for want of time"
    again, ids = fork(twin), torch.tensor(token_prompts(1))
    nothing = torch.nn.Linear(64, again.config.vocab_size, bias=False)
    torch.nn.init.zeros_(nothing.weight)
    again.set_submodule("lm_head", nothing)
    with torch.no_grad():
        assert again(input_ids=ids).logits.abs().max() == 0
        assert twin(input_ids=ids).logits.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_prompts_of_any_length_are_compiled_once(arch: str) -> None:
    model = tiny(arch)
    variant = Variant(model).with_transforms([PLAN, StaticCache()])
    served = serving(variant)
    seen = list[int]()
    for length in (1, 5, 13, 40, 3):
        ids = torch.tensor(token_prompts(1, length=length))
        options = {"max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(served.generate(ids, **options), model.generate(ids, **options))
        seen.append(forward_of(variant).compilations)
    assert seen[2:] == [seen[2]] * 3, "compiled for a length"
    assert seen[2] <= 4, "more than: on trial, for one token, for several, for more than a window"
    padded = left_padded()
    assert torch.equal(served.generate(**padded, max_new_tokens=8), model.generate(**padded, max_new_tokens=8))
    assert PLAN.took_effect(variant) is None
    assert variant.modules["decode"] is model
    assert "compiled already" in (PLAN.unavailable(variant, CPU) or "")


@pytest.mark.fault("A18")
@pytest.mark.slow
def test_a_storm_of_compilations_ends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled_prefill, "MOST_COMPILATIONS", 1)
    model, padded = tiny("llama"), left_padded()
    variant = Variant(model).with_transform(PLAN)
    served = serving(variant)
    for _ in range(3):
        assert torch.equal(served.generate(**padded, max_new_tokens=4), model.generate(**padded, max_new_tokens=4))
    assert forward_of(variant).compilations == 2
    assert [r.levelname for r in caplog.records if "runs uncompiled" in r.getMessage()] == ["WARNING"]
    assert "runs uncompiled" in (PLAN.took_effect(variant) or "")


@pytest.mark.fault("A16")
def test_what_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(Recompiling, "_compile", fail)
    model = tiny("llama")
    with pytest.raises(TransformError, match=r"prefill does not compile: .*no kernel for this"):
        Variant(model).with_transform(PLAN)
    assert "forward" not in vars(model)


def test_says_why_not() -> None:
    variant = Variant(tiny("llama"))
    assert PLAN.unavailable(variant, CPU) is None
    assert "C++ compiler" in (PLAN.unavailable(variant, replace(CPU, compiler=None)) or "")
    assert PLAN.took_effect(variant) == "prefill was not compiled"
    with pytest.raises(ChoiceError, match="phase must be 'prefill'"):
        CompilePrefill(phase="decode")
