"""Steps that were lowered by another process: the same programs, and only over memory that lies as it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autotune import transforms
from autotune.model import seam
from autotune.runtime.cache.rows import RowCache
from autotune.runtime.steps.program import Program, StepPrograms, kept, recorded
from autotune.runtime.steps.program.lower import Lowered
from autotune.runtime.variant import Variant
from tests.models import tiny, token_prompts
from tests.runtime.test_program import ARCHITECTURES, needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("one_thread")]

SLOTS = 32


def packed(name: str = "llama") -> Any:
    """The decode module of a new model with packed weights; it is the same model each time."""
    plan = [("weight_only", {"bits": 8}), ("one_query_attention", {})]
    return Variant(tiny(name)).with_transforms([transforms.make(*each, "decode") for each in plan]).modules["decode"]


def over(module: Any, rows: int = 1) -> RowCache:
    filled = seam.growing_cache()
    module(torch.tensor(token_prompts(1, length=5)), **seam.over(module, filled))
    return RowCache(filled, SLOTS, rows)


class Shelf:
    """Keeps one step."""

    def __init__(self, module: Any, lowered: Lowered) -> None:
        found = kept.written(lowered, module)
        assert found is not None
        self.text, self.folded = found
        self.inputs = kept.inputs_of(lowered)

    def find(self, module: Any, inputs: Any) -> Lowered | None:
        return kept.read(self.text, self.folded, module) if inputs == self.inputs else None


def shelf(module: Any, rows: int = 1) -> Shelf:
    return Shelf(module, recorded.RecordedStep(module, over(module, rows)).program.lowered)


@pytest.fixture
def record_no_more(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it has every later recording fail."""

    def fail(*_: Any) -> None:
        pytest.fail("the step is recorded again")

    return lambda: monkeypatch.setattr(recorded, "trace", fail)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_is_read_back_for_the_same_model_in_another_process(name: str, rows: int) -> None:
    """A model of its own stands for that of the other process."""
    first, second = packed(name), packed(name)
    own = recorded.RecordedStep(second, over(second, rows)).program
    found = shelf(first, rows)
    again = Program(kept.read(found.text, found.folded, second))
    assert torch.equal(again._code, own._code)
    assert again.instructions == own.instructions
    assert all(map(torch.equal, again._weights, own._weights))
    named = [w.data_ptr() for w in again._weights if w.numel() > 64]
    assert {w.data_ptr() for w in own._weights if w.numel() > 64} & set(named)  # weights are the module's own


def test_a_step_that_is_kept_is_not_recorded(record_no_more: Callable[[], None]) -> None:
    module = packed()
    cache = over(module, 4)
    made = recorded.RecordedStep(module, cache)
    record_no_more()
    with kept.reusing(Shelf(module, made.program.lowered)):
        steps = StepPrograms(module)
    ids, at = torch.tensor(token_prompts(1, length=4)).T, torch.full((4, 1), 5)
    expected, found = (step(ids, at, cache).clone() for step in (made.over(cache), steps.fitting(cache)))
    assert torch.equal(found, expected)
    assert expected.abs().sum() > 0


def test_nor_are_several_tokens_of_one(record_no_more: Callable[[], None]) -> None:
    module = packed()
    cache = over(module)
    made = recorded.TokensOfOne(module, over(module, 4))
    record_no_more()
    with kept.reusing(Shelf(module, made.program.lowered)):
        steps = StepPrograms(module)
    steps.prepare_several(lambda: over(module, 4))
    found = steps.several(4, cache)
    assert found is not None
    ids, at = torch.tensor(token_prompts(1, length=4)), torch.arange(5, 9)[None]
    expected = made.step(ids, at, cache).clone()
    assert torch.equal(found.step(ids, at, cache), expected)
    assert expected.abs().sum() > 0


def test_another_shape_is_recorded(record_no_more: Callable[[], None]) -> None:
    module = packed()
    with kept.reusing(shelf(module)):
        steps = StepPrograms(module)
    record_no_more()
    with pytest.raises(pytest.fail.Exception, match="recorded again"):
        steps.prepare(over(module, 3))


def test_after_weights_have_moved_a_step_is_recorded(record_no_more: Callable[[], None]) -> None:
    """Values that were folded may be others."""
    module = packed()
    with kept.reusing(shelf(module)):
        steps = StepPrograms(module)
    steps.forget()
    record_no_more()
    with pytest.raises(pytest.fail.Exception, match="recorded again"):
        steps.prepare(over(module))


def moved(module: Any) -> None:
    norm = module.model.norm
    norm.weight = torch.nn.Parameter(torch.cat([norm.weight, norm.weight])[len(norm.weight) :], requires_grad=False)


def strided(module: Any) -> None:
    table = module.model.embed_tokens
    table.weight = torch.nn.Parameter(table.weight.T.contiguous().T, requires_grad=False)


def missing(module: Any) -> None:
    del module.model.norm.weight
    module.model.norm.scale = torch.ones(64)


def narrower(module: Any) -> None:
    module.model.norm.to(torch.float16)


OTHERWISE: dict[str, Callable[[Any], None]] = {each.__name__: each for each in (moved, strided, missing, narrower)}


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE.keys())
def test_a_step_is_not_read_for_weights_that_lie_otherwise(change: Callable[[Any], None]) -> None:
    module = packed()
    found = shelf(module)
    change(module)
    with pytest.raises(ValueError, match="does not lie as it did"):
        found.find(module, found.inputs)


def test_nor_for_one_memory_that_became_two() -> None:
    """Instructions over the first name would read the first memory for both."""
    module = packed()
    norms = [module.model.layers[i].input_layernorm for i in range(2)]
    norms[1].weight = norms[0].weight
    found = shelf(module)
    norms[1].weight = torch.nn.Parameter(norms[1].weight.clone(), requires_grad=False)
    with pytest.raises(ValueError, match="has memory of its own"):
        found.find(module, found.inputs)


def test_nor_without_a_folded_value() -> None:
    module = packed()
    found = shelf(module)
    found.folded.popitem()
    with pytest.raises(ValueError, match="is missing"):
        found.find(module, found.inputs)


def test_a_step_with_many_folded_values_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    module = packed()
    lowered = recorded.RecordedStep(module, over(module)).program.lowered
    monkeypatch.setattr(kept, "MOST_FOLDED", 8)
    assert kept.written(lowered, module) is None
