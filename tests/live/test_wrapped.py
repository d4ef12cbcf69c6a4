"""Whoever compares a wrapped model with something else gets what serves it at that moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from autotune.live.wrap import wrap
from autotune.model import route
from autotune.model.revision import Revision
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.runtime.wrapped import serving_variant, tuned_on
from autotune.transforms import make
from tests.models import tiny, token_prompts


@pytest.fixture
def model() -> Any:
    wrapped = wrap(tiny("llama"), when="manual", cache=False)
    handle: Any = wrapped.autotune
    handle._serving.revision = Revision(wrapped)
    handle._serving.begin(Variant(route.bare(wrapped)).with_transform(make("lean_loop", {}, "decode")), None)
    return wrapped


CHANGES: dict[str, tuple[Callable[[Any], object], bool]] = {
    "as committed": (lambda model: None, True),
    "rolled back": (lambda model: model.autotune.rollback(), False),
    "unwrapped": (lambda model: model.autotune.unwrap(), False),
    "a plan that failed": (lambda model: model.autotune._serving.watch.failed("made up"), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_serves_is_the_plan_or_the_original(model: Any, name: str) -> None:
    change, by_plan = CHANGES[name]
    active = model.autotune.active
    change(model)
    found = serving_variant(model)
    assert (found is active) == by_plan
    assert bool(found.transforms) == by_plan
    assert found.original.lm_head is model.lm_head


def test_a_model_that_was_never_wrapped_serves_itself() -> None:
    model = tiny("llama")
    assert serving_variant(model).transforms == ()
    assert tuned_on(model) == ()
    assert serving_variant(serving(Variant(model))).transforms == (), "a measured variant is no wrapped model"


def test_the_prompts_are_those_it_was_given() -> None:
    prompts = token_prompts(3, length=9)
    assert tuned_on(wrap(tiny("llama"), workload=prompts, when="manual", cache=False)) == tuple(map(tuple, prompts))


def test_the_handle_has_the_arguments_of_wrap() -> None:
    options = wrap(tiny("llama"), when="manual", observe=3, policy="latency", watch=0.5).autotune.options
    assert (options.when, options.observe, options.policy.name, options.watch) == ("manual", 3, "latency", 0.5)
