"""The modes of a process or a thread, default dtype and inference mode, change nothing that is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from autotune import kernels, transforms
from autotune.errors import VariantError
from autotune.program import StepPrograms
from autotune.transforms import Transform
from autotune.variant import Variant, serving
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
    return out.tolist()  # type: ignore[no-any-return]


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
    from autotune.cache import SlotCache, example

    variant = Variant(tiny("llama")).with_transforms(plan("program"))
    assert isinstance(variant.step, StepPrograms)
    cache = SlotCache(example(variant.original, 3), 64)
    step = variant.step.fitting(cache)
    with pytest.raises(VariantError, match=r"\[3, 1\], not \[1, 1\]"):
        step(ONE[:, :1], ONE[:, :1], cache)
