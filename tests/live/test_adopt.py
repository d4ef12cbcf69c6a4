"""Another plan is verified beside the requests and serves; what served before comes back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import autotune
from autotune.errors import PlanError, StateError
from autotune.live.status import State
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.static_cache import StaticCache
from autotune.tune import fingerprint
from autotune.tune.bench import LiveBench
from autotune.tune.plan import Plan
from autotune.validate import Verdict
from tests.live.test_wrap import greedy
from tests.models import tiny, token_prompts
from tests.tune.test_tune import KEPT, QUALITY, latency


def made_for(model: Any, *transforms: Any) -> Plan:
    """A plan of another machine for this model."""
    return replace(
        KEPT, fingerprint=replace(KEPT.fingerprint, model=fingerprint.of_model(model)), transforms=transforms
    )


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[Verdict]:
    """The verdicts of verifications to come; the last one stays."""
    coming = [Verdict.PASS]

    def prove(self: Any, variant: Any) -> Any:
        return QUALITY, latency(coming.pop(0) if len(coming) > 1 else coming[0])

    monkeypatch.setattr(LiveBench, "prove", prove)
    return coming


def test_a_plan_that_holds_serves_until_what_served_before_is_restored(verdicts: list[Verdict]) -> None:
    model = tiny("llama")
    said, lean, slots = greedy(model), made_for(model, LeanLoop()), made_for(model, StaticCache())
    handle = autotune.wrap(model, workload=token_prompts(4), when="manual", cache=False).autotune
    original = handle.adopt(lean)
    assert (handle.status.state, handle.plan) == (State.TUNED, lean)
    adopted = handle.adopt(slots)
    assert handle.status.transforms == tuple(map(str, slots.transforms))
    assert greedy(model) == said
    handle.restore(adopted)
    assert handle.plan is lean
    assert handle.status.transforms == tuple(map(str, lean.transforms))
    assert greedy(model) == said
    handle.restore(original)
    assert (handle.status.state, handle.status.transforms, handle.plan) == (State.WAITING, (), None)
    assert greedy(model) == said
    handle.unwrap()


def test_a_plan_that_does_not_hold_changes_nothing(verdicts: list[Verdict]) -> None:
    model = tiny("llama")
    lean = made_for(model, LeanLoop())
    handle = autotune.wrap(model, workload=token_prompts(4), when="manual", cache=False).autotune
    handle.adopt(lean)
    verdicts[:] = [Verdict.FAIL]
    with pytest.raises(PlanError, match="did not hold"):
        handle.adopt(made_for(model, StaticCache()))
    with pytest.raises(PlanError, match="made for model"):
        handle.adopt(KEPT)
    assert (handle.status.state, handle.plan) == (State.TUNED, lean)
    with handle._tuning.lock, pytest.raises(StateError, match="under way"):
        handle.adopt(lean)
    handle.unwrap()
