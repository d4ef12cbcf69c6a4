"""When graphs are captured: while a transform is applied, each in a turn, and never while a request is under way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from autotune.live.original import Original
from autotune.runtime.cache.pool import CachePool
from autotune.runtime.dispatch import serving
from autotune.runtime.steps.captures import wanted
from autotune.runtime.steps.graphs import GraphSteps
from autotune.runtime.traffic import Traffic
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.cuda_graph import CudaGraph
from autotune.transforms.speculation import Speculation
from autotune.workload import Workload
from tests.fakes.cuda import FakeCuda
from tests.models import tiny, token_prompts

GRAPH = CudaGraph(phase="decode", shortest=16)
PLANS: dict[str, list[Transform]] = {
    "graphs": [GRAPH],
    "guesses from the prompt": [GRAPH, Speculation("decode", "prompt", 3)],
    "guesses of a draft": [GRAPH, Speculation("decode", "model", 3)],
}


def made(plan: str, traffic: Traffic | None = None) -> Variant:
    work = Workload(tuple(map(tuple, token_prompts(4))), 12, (1, 3))
    return Variant(tiny(), traffic, work, tiny()).with_transforms(PLANS[plan])


def ask(model: Any, count: int = 1, **options: Any) -> torch.Tensor:
    ids = torch.tensor(token_prompts(count))
    return model.generate(ids, **({"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options))


class Together:
    """A streamer whose calls go on once all of them have come to the third token, and so have their caches."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier
        self.seen = 0

    def put(self, value: torch.Tensor) -> None:
        self.seen += 1
        if self.seen == 4:  # the prompt comes first
            self.barrier.wait()

    def end(self) -> None: ...


def at_once(model: Any) -> torch.Tensor:
    barrier, answers = threading.Barrier(3), list[torch.Tensor]()
    calls = [threading.Thread(target=lambda: answers.append(ask(model, streamer=Together(barrier)))) for _ in "123"]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    return torch.cat(answers)


REQUESTS: dict[str, Callable[[Any], torch.Tensor]] = {
    "long": lambda model: ask(model, max_new_tokens=100),
    "wide": lambda model: ask(model, 5),
    "in between": lambda model: ask(model, 2),
    "at once": at_once,
}


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("plan", PLANS)
def test_no_request_captures(plan: str, request_: str, fake: FakeCuda) -> None:
    variant, request = made(plan), REQUESTS[request_]
    if variant.speculation is not None:
        variant.speculation.costs = (1.0, 1.1, 1.1, 1.1)
    captures = fake.captures
    assert torch.equal(request(serving(variant)), request(variant.original))
    assert fake.captures == captures > 0


@pytest.mark.parametrize(
    ("rows", "lengths", "longest", "caches", "order"),
    [
        ((1,), (16, 32), 32, 1, [(1, 1, 16), (1, 1, 32)]),
        ((1,), (16, 32), 16, 2, [(1, 1, 16), (1, 1, 32), (2, 1, 16), (2, 1, 32)]),
        ((1, 4), (16, 32), 16, 1, [(1, 1, 16), (1, 4, 16), (1, 1, 32), (1, 4, 32)]),
        ((1,), (16, 32), 99, 1, [(1, 1, 16), (1, 1, 32)]),
        ((1,), tuple(range(1, 99)), 99, 2, [(1, 1, read) for read in range(1, 65)]),
    ],
)
def test_the_workload_is_captured_first(
    rows: tuple[int, ...], lengths: tuple[int, ...], longest: int, caches: int, order: list[tuple[int, int, int]]
) -> None:
    assert wanted(rows, lengths, longest, caches) == order


def test_graphs_are_limited(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond is not captured, and runs uncaptured."""
    monkeypatch.setattr("autotune.runtime.steps.captures.MOST_GRAPHS", 5)
    variant = made("graphs")
    assert isinstance(variant.step, GraphSteps)
    assert fake.captures == len(variant.step.shapes) == 5
    assert set(variant.step.shapes) > {(1, 32), (4, 32)}, "what the workload needs"
    assert torch.equal(ask(serving(variant), 3, max_new_tokens=60), ask(variant.original, 3, max_new_tokens=60))
    assert fake.captures == 5
    assert dict(variant.step.fallbacks) == {"no graph reads 64 slots": 32, "no graph reads 128 slots": 7}


@pytest.mark.parametrize(("spare", "kept"), [(-1, 1), (0, 2)])
def test_a_cache_for_a_second_caller_is_made_if_there_is_room(spare: int, kept: int, fake: FakeCuda) -> None:
    variant = made("graphs")
    assert variant.caches is not None
    pool, prompt = CachePool(variant.original.config, 64, (1,), lasting=2), variant.example(1)
    with pool.keep(prompt, 1) as (cache,):
        fake.free_bytes = 4 * sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) + spare
    with pool.keep(prompt, 2) as caches:
        assert cache in caches
        assert len(caches) == kept
        with pool.lend(prompt, None) as other:
            assert not other.lasting, "nothing would be recorded for it"


@contextmanager
def turns_of(fake: FakeCuda, traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int | None]]:
    """The number of the turn in which each capture took place; None: in none."""
    capture, step, turns, noted = fake.capture, traffic.step, list[int](), list[int | None]()

    @contextmanager
    def counted() -> Iterator[None]:
        with step():
            turns.append(len(turns))
            yield

    def seen(*given: Any) -> Any:
        noted.append(turns[-1] if traffic._measuring is not None else None)
        return capture(*given)

    with monkeypatch.context() as patch:
        patch.setattr(traffic, "step", counted)
        patch.setattr(fake, "capture", seen)
        yield noted


@pytest.mark.parametrize("plan", PLANS)
def test_every_capture_has_a_turn(plan: str, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """One turn for each length, so that requests need not wait for all of them."""
    traffic = Traffic()
    with turns_of(fake, traffic, monkeypatch) as turns:
        variant = made(plan, traffic)
        assert turns
        assert None not in turns
        assert max(Counter(turns).values()) <= 2, "a graph for each of the caches that are kept"
        turns.clear()
        with traffic.step():
            Original(variant.original).release(variant)
        assert turns
        assert None not in turns
