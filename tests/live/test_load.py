"""What a wrapped model says of the engine that serves it, as numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from autotune.runtime import kernels
from autotune.runtime.batching.load import EngineLoad
from tests.live.test_submit import LONG, TOKENS, Held, served_together
from tests.models import tiny, token_prompts
from tests.serve.servers import until

pytestmark = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
ROWS, SLOTS, PART = 4, 192, 128  # of the plan, and of prompts that are looked up


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    found: Any = served_together(tiny("llama"))
    yield found
    found.autotune.unwrap()


def test_the_load_is_counted(model: Any) -> None:
    before = model.autotune.status.load
    prompt = token_prompts(1, length=PART + 20)[0]
    for expected in (0, len(prompt)):
        request = model.autotune.submit(prompt, max_new_tokens=3, **TOKENS)
        request.result()
        assert request.terms.arrived_s <= request.terms.begun_s
        after = model.autotune.status.load
        assert (after.queried - before.queried, after.reused - before.reused) == (len(prompt), expected)
        assert after.steps[1] - before.steps.get(1, 0) == 2  # the first token comes of the prompt
        before = after
    assert (after.waiting, after.usage) == (0, 0.0)


def test_rows_under_way_use_the_cache_and_a_request_begins_when_the_engine_takes_it(model: Any) -> None:
    hold = Held(after=1)
    request = model.autotune.submit(token_prompts(1, length=40)[0], **LONG, logits_processor=[hold])
    assert hold.started.wait(60)
    assert model.autotune.status.load.usage == 41 / (ROWS * SLOTS)  # the prompt and the token before the one held
    other = model.autotune.submit(token_prompts(1, length=10)[0], max_new_tokens=2, **TOKENS)
    until(lambda: model.autotune.status.load.waiting == 1)  # for the engine, whose thread is held
    released_s = time.monotonic()
    request.cancel()
    hold.go_on.set()
    other.result()
    assert other.terms.begun_s > released_s
    with pytest.raises(RuntimeError, match="cancelled"):
        request.result()


def test_the_breaker_shows(model: Any) -> None:
    assert not model.autotune.status.resting
    model.autotune._serving.watch.failed("a test says so")
    status = model.autotune.status
    assert status.resting
    assert not status.transforms
    model.autotune.rollback()
    assert model.autotune.status.load == EngineLoad()
    assert not model.autotune.status.resting
