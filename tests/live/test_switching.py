"""Plans come and go under live calls: every answer is the model's, and a commit that fails leaves the original."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import autotune
from autotune import transforms
from autotune.live import winner
from autotune.live.original import Original
from autotune.live.watch.watch import Watch
from autotune.machine import device
from autotune.model import revision
from autotune.runtime import kernels
from autotune.runtime.variant import Transform
from autotune.transforms.continuous_batching import ContinuousBatching
from autotune.transforms.cuda_graph import CudaGraph
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.static_cache import StaticCache
from autotune.transforms.step_program import StepProgram
from autotune.tune import run as tuning
from tests.fakes.cuda import FakeCuda
from tests.live.test_wrap import greedy, scripted, wrapped  # noqa: F401 - a fixture
from tests.models import tiny, token_prompts
from tests.serve.servers import until

needs_kernels = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
TOGETHER = [StepProgram("decode", slots=64), ContinuousBatching("decode", rows=4)]
ON_A_GPU = [CudaGraph("decode", shortest=32, slots=64), ContinuousBatching("decode", rows=4)]
PROMPTS = [torch.tensor([prompt]) for prompt in token_prompts(6)]
CALLS, SWITCHES = 12, 40


@pytest.fixture
def place(plan: list[Transform]) -> Iterator[None]:
    """Where a plan runs."""
    with device.stand_in(FakeCuda()) if plan is ON_A_GPU else nullcontext():
        yield


@pytest.mark.fault("D57")
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    "plan", [[LeanLoop()], [StaticCache()], pytest.param(TOGETHER, marks=needs_kernels), ON_A_GPU], ids=str
)
def test_threads_are_answered_while_plans_are_switched(scripted: list[Transform], plan: list[Transform]) -> None:  # noqa: F811
    scripted[:] = plan
    model = wrapped(tiny("llama"))
    expected = [greedy(tiny("llama"), ids) for ids in PROMPTS]
    wrong: list[str] = []
    left = threading.Semaphore(0)

    def ask(number: int) -> None:
        try:
            found = [greedy(model, PROMPTS[number]) for _ in range(CALLS)]
            wrong.extend(f"prompt {number}: {each}" for each in found if each != expected[number])
        except Exception as error:
            wrong.append(f"prompt {number}: {type(error).__name__}: {error}")
        finally:
            left.release()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for _ in range(SWITCHES):
        model.autotune.rollback()
        model.autotune.commit()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 0 < model.autotune.status.served <= CALLS * len(PROMPTS)


@pytest.mark.fault("D57")
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("plan", [pytest.param(TOGETHER, marks=needs_kernels), ON_A_GPU], ids=str)
@pytest.mark.parametrize("submitted", [False, True])
def test_a_step_that_fails_for_many_is_answered_by_the_original_and_counted_once(
    scripted: list[Transform],  # noqa: F811
    submitted: bool,
    plan: list[Transform],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted[:] = plan
    model = wrapped(tiny("llama"))
    expected = [greedy(tiny("llama"), ids, 30) for ids in PROMPTS]
    engine = model.autotune._winner.tuned.variant.engine
    logits, came = engine.sequences.logits, threading.Event()

    def failing() -> torch.Tensor:
        if not came.is_set():  # as many as there are rows, before one is answered
            until(lambda: engine.sequences.used + engine.load.waiting >= engine.most_rows)
            came.set()
        if sum(request is not None for request in engine.sequences.rows) == engine.most_rows:
            raise RuntimeError("no such kernel")
        return logits()

    monkeypatch.setattr(engine.sequences, "logits", failing)
    streamers, options = [Counting() for _ in PROMPTS], {"max_new_tokens": 30, "do_sample": False}
    if submitted:
        requests = [model.autotune.submit(ids, **options) for ids in PROMPTS]
        with pytest.warns(RuntimeWarning, match="no such kernel"):
            found = [request.result(60).tolist() for request in requests]
        assert found == expected
        assert [event.phase for event in model.autotune.events] == ["open"]
        return
    with pytest.warns(RuntimeWarning, match="no such kernel"), ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(lambda n: greedy(model, PROMPTS[n], 30, streamer=streamers[n]), range(len(PROMPTS))))
    assert found == expected
    assert [s.tokens for s in streamers] == [answer[0] for answer in expected], "something was streamed twice, or not"
    assert [event.phase for event in model.autotune.events] == ["open"]


class Counting:
    """A streamer that keeps what it gets, the prompt included."""

    def __init__(self) -> None:
        self.tokens = list[int]()

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None: ...


class Switching:
    """A streamer that changes plans in the middle of an answer."""

    def __init__(self, change: Callable[[], object]) -> None:
        self.change = change
        self.seen = 0

    def put(self, value: Any) -> None:
        self.seen += 1
        if self.seen == 4:
            self.change()

    def end(self) -> None:
        pass


@pytest.mark.fault("D59")
@pytest.mark.parametrize("way", ["rollback", "unwrap"])
def test_a_call_under_way_finishes_as_it_started(scripted: list[Transform], way: str) -> None:  # noqa: F811
    scripted[:] = [StaticCache()]
    model = wrapped(tiny("llama"))
    streamer = Switching(getattr(model.autotune, way))
    assert greedy(model, streamer=streamer) == greedy(tiny("llama"))
    assert streamer.seen == 9


def break_down(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken off here")


@pytest.mark.fault("D60")
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (tuning, "tune"),
        (revision.Revision, "__init__"),
        (revision.Revision, "differs"),
        (Watch, "begin"),
        (winner, "releasable_bytes"),
        (Original, "release"),
    ],
)
def test_a_commit_that_fails_leaves_a_model_that_answers(
    scripted: list[Transform],  # noqa: F811
    owner: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted[:] = [transforms.make("weight_storage", {"dtype": "float16"}), StaticCache()]
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = greedy(model)
    monkeypatch.setattr(owner, name, break_down)
    with pytest.raises((RuntimeError, autotune.AutotuneError), match="broken off here"):
        wrapped(model, keep_original=False)
    monkeypatch.undo()
    assert greedy(model) == expected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.fault("D66")
@pytest.mark.parametrize("plan", [[], [LeanLoop()], [StaticCache()]], ids=str)
def test_calls_leave_no_tensors_behind(scripted: list[Transform], plan: list[Transform]) -> None:  # noqa: F811
    scripted[:] = plan
    model = wrapped(tiny("llama"))

    def alive_after(calls: int) -> int:
        for number in range(calls):
            greedy(model, PROMPTS[number % len(PROMPTS)])
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    settled = alive_after(8)  # caches are made
    while (now := alive_after(2)) < settled:  # threads of earlier tests end, and leave theirs
        settled = now
    assert alive_after(24) == settled
    kept = [torch.ones(1)]
    assert alive_after(8) == settled + len(kept), "a leak would be seen"
