"""The modes of a process or a thread change nothing that is recorded; a call in one is answered as without us."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autotune import transforms
from autotune.errors import VariantError
from autotune.model.twins import fork
from autotune.runtime import kernels
from autotune.runtime.dispatch import serving
from autotune.runtime.steps.program import StepPrograms
from autotune.runtime.variant import Transform, Variant
from tests.live.test_wrap import scripted, wrapped  # noqa: F401 - a fixture
from tests.models import tiny, token_prompts

needs_kernels = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
DTYPES = [torch.float16, torch.bfloat16, torch.float64]
PLANS: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "slots": [("static_cache", {}, "decode")],
    "program": [("step_program", {}, "decode")],
    "storage and program": [("weight_storage", {"dtype": "float16"}, "decode"), ("step_program", {}, "decode")],
    "fused": [("prefill_attention", {"precision": "float32"}, "prefill"), ("fused_layers", {}, "prefill")],
}
ONE, MANY = torch.tensor(token_prompts(1)), torch.tensor(token_prompts(3))  # a plan is prepared for one sequence


def plan(name: str) -> list[Transform]:
    return [transforms.make(*each) for each in PLANS[name]]


def tokens(model: Any, ids: torch.Tensor) -> list[list[int]]:
    with torch.no_grad():
        out: torch.Tensor = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return out.tolist()


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Sets nothing; puts the default back."""
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@needs_kernels
@pytest.mark.parametrize("default_dtype", DTYPES, indirect=True, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_made_under_another_default_dtype(name: str, default_dtype: torch.dtype) -> None:
    model = tiny("llama")
    expected = tokens(model, ONE)
    torch.set_default_dtype(default_dtype)
    served = serving(Variant(model).with_transforms(plan(name)))
    assert tokens(served, ONE) == expected
    torch.set_default_dtype(torch.float32)
    assert tokens(served, ONE) == expected


@needs_kernels
@pytest.mark.parametrize("default_dtype", DTYPES, indirect=True, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_a_batch_first_seen_under_another_default_dtype(name: str, default_dtype: torch.dtype) -> None:
    model = tiny("llama")
    served = serving(Variant(model).with_transforms(plan(name)))
    expected = tokens(model, MANY)
    torch.set_default_dtype(default_dtype)
    assert tokens(served, MANY) == expected
    torch.set_default_dtype(torch.float32)
    assert tokens(served, MANY) == expected


@needs_kernels
@pytest.mark.parametrize("first", [True, False], ids=["inside first", "outside first"])
@pytest.mark.parametrize("name", PLANS)
def test_a_batch_first_seen_on_one_side_of_inference_mode(name: str, first: bool) -> None:
    model = tiny("llama")
    served = serving(Variant(model).with_transforms(plan(name)))
    expected = tokens(model, MANY)
    for inside in (first, not first, first):
        with torch.inference_mode(inside):
            assert tokens(served, MANY) == expected


@needs_kernels
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_made_in_inference_mode(name: str) -> None:
    model = tiny("llama")
    expected = [tokens(model, ids) for ids in (ONE, MANY)]
    with torch.inference_mode():
        served = serving(Variant(model).with_transforms(plan(name)))
        tokens(served, ONE)
    assert [tokens(served, ids) for ids in (ONE, MANY)] == expected


@needs_kernels
def test_a_step_takes_one_token_a_sequence() -> None:
    from autotune.runtime.cache.slots import SlotCache

    variant = Variant(tiny("llama")).with_transforms(plan("program"))
    assert isinstance(variant.step, StepPrograms)
    cache = SlotCache(variant.example(3), 64)
    step = variant.step.fitting(cache)
    with pytest.raises(VariantError, match=r"\[3, 1\], not \[1, 1\]"):
        step(ONE[:, :1], ONE[:, :1], cache)


# Modes under which a call is not the one that a plan was proven for


class Doubling(TorchFunctionMode):
    def __torch_function__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = called(*args, **(kwargs or {}))
        return out * 2 if called is functional.silu else out


class DoublingOperators(TorchDispatchMode):
    def __torch_dispatch__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = called(*args, **(kwargs or {}))
        return out * 2 if called is torch.ops.aten.silu.default else out


def each_row(model: Any) -> torch.Tensor:
    rows: torch.Tensor = torch.func.vmap(lambda ids: model(ids[None], use_cache=False).logits)(MANY)
    return rows


def tangent(model: Any) -> torch.Tensor:
    """Derivative of the logits by the last norm's weight, forward-mode."""
    weight = model.model.norm.weight.detach()

    def logits(value: torch.Tensor) -> torch.Tensor:
        given = {"model.norm.weight": value}, (ONE,), {"use_cache": False}
        return torch.func.functional_call(model, *given).logits

    return torch.func.jvp(logits, (weight,), (torch.ones_like(weight),))[1]


def in_mode(mode: Callable[[], Any], call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(model: Any) -> Any:
        with mode():
            return call(model)

    return run


def answer(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.generate(ONE, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return out


def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(ONE).logits
    return out


def half() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


FUNC = "a transform of torch.func or forward-mode AD"
MODES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "autocast, generate": (in_mode(half, answer), "autocast"),
    "autocast, forward": (in_mode(half, logits), "autocast"),
    "functions, generate": (in_mode(Doubling, answer), "a mode that sees every function"),
    "functions, forward": (in_mode(Doubling, logits), "a mode that sees every function"),
    "operators, generate": (in_mode(DoublingOperators, answer), "a mode that sees every operator"),
    "operators, forward": (in_mode(DoublingOperators, logits), "a mode that sees every operator"),
    "vmap": (each_row, FUNC),
    "jvp": (tangent, FUNC),
}


@needs_kernels
@pytest.mark.parametrize("name", MODES)
def test_a_call_in_a_mode_is_the_originals(scripted: list[Transform], name: str) -> None:  # noqa: F811
    scripted[:] = [*plan("fused"), *plan("storage and program")]
    plain, model = tiny("llama"), wrapped(tiny("llama"))
    run, reason = MODES[name]
    with torch.no_grad():
        assert torch.equal(run(model), run(plain))
    status = model.autotune.status
    assert (status.state, status.served, set(status.bypassed)) == ("tuned", 0, {reason})
    assert tokens(model, ONE) == tokens(plain, ONE)
    assert model.autotune.status.served == 1


@needs_kernels
def test_a_default_device_is_no_mode(scripted: list[Transform]) -> None:  # noqa: F811
    scripted[:] = [*plan("fused"), *plan("storage and program")]
    plain, model = tiny("llama"), wrapped(tiny("llama"))
    with torch.device("meta"):
        assert tokens(model, ONE) == tokens(plain, ONE)
    assert model.autotune.status.served == 1


# Calls that are recorded


def compiled_whole(model: Any) -> torch.Tensor:
    out: torch.Tensor = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager", fullgraph=True)(
        ONE
    )
    return out


def compiled_model(model: Any) -> torch.Tensor:
    out: torch.Tensor = torch.compile(model, backend="eager")(ONE, use_cache=False).logits
    return out


def compiled_layer(model: Any) -> torch.Tensor:
    model.model.layers[0].compile(backend="eager")
    return logits(model)


def traced(model: Any) -> torch.Tensor:
    class Logits(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> Any:
            return model(ids, use_cache=False, return_dict=False)[0]

    out: torch.Tensor = torch.jit.trace(Logits(), (ONE,), check_trace=False)(ONE)
    return out


@needs_kernels
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("record", [compiled_whole, compiled_model, compiled_layer, traced])
def test_what_is_recorded_is_the_original(scripted: list[Transform], record: Callable[[Any], Any]) -> None:  # noqa: F811
    scripted[:] = [*plan("fused"), *plan("storage and program")]
    plain, model = tiny("llama"), wrapped(tiny("llama"))
    with torch.no_grad():
        assert torch.allclose(record(model), record(plain), atol=1e-4)  # fused kernels sum in another order
    torch.compiler.reset()
    assert tokens(model, ONE) == tokens(plain, ONE)
    assert model.autotune.status.state == "tuned"


@needs_kernels
def test_a_twin_of_a_compiled_layer_is_no_longer_compiled() -> None:
    model = tiny("llama")
    model.model.layers[0].compile(backend="eager")
    twin = fork(model)
    twin.model.layers[0].forward = lambda hidden, **_: hidden
    with torch.no_grad():
        assert not torch.equal(logits(twin), logits(model))
    torch.compiler.reset()
