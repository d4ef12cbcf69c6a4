"""Submitted requests: they stream, are cancelled and are late, with a plan that decodes together and without one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import GenerationConfig

from autotune.errors import (
    CancelledRequestError,
    DeadlineError,
    QueueFullError,
    StateError,
    WorkloadError,
)
from autotune.live import submit
from autotune.report import Report
from autotune.runtime import kernels
from autotune.runtime.batching.engine import Engine
from autotune.runtime.batching.terms import RequestTerms
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.continuous_batching import ContinuousBatching
from autotune.transforms.step_program import StepProgram
from autotune.transforms.weight_only import WeightOnly
from autotune.tune import plan as plans
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.tuned import Tuned
from tests.live.test_wrap import scripted, wrapped  # noqa: F401 - a fixture
from tests.machine.test_ending import noise, run
from tests.models import PAD, VOCABULARY, tiny, token_prompts
from tests.serve.servers import until
from tests.surroundings import without_threads

needs_kernels = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
ALONE = [WeightOnly("decode"), StepProgram("decode", slots=192)]
PLANS = {"original": [], "alone": ALONE, "together": [*ALONE, ContinuousBatching("decode", rows=4)]}
PROMPTS = token_prompts(10)
TOKENS = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
DRAWN_TWICE = GenerationConfig(num_return_sequences=2, do_sample=True)
LONG = TOKENS | {"max_new_tokens": 150}


@pytest.fixture(params=PLANS)
def model(request: pytest.FixtureRequest, scripted: list[Transform]) -> Iterator[Any]:  # noqa: F811
    if request.param != "original" and kernels.available() is not None:
        pytest.skip(str(kernels.available()))
    scripted[:] = PLANS[request.param]
    model: Any = wrapped(tiny("llama"))
    yield model
    model.autotune.unwrap()


class Held:
    """A logits processor that waits before a token, so that a request stays under way and others wait behind it."""

    def __init__(self, after: int = 0) -> None:
        self.after = after
        self.started, self.go_on = threading.Event(), threading.Event()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.after -= 1
        if self.after < 0:
            self.started.set()
            assert self.go_on.wait(60)
        return scores


def under_way(model: Any, count: int) -> list[submit.Submitted]:
    """Submit long requests, the first of which waits within a step until a caller waits for a turn after it.

    So the next caller who wants the model alone gets it while they are under way, however fast this machine is.
    """
    turns, begun = engine_of(model).turns, threading.Event()

    def hold(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not begun.is_set():
            begun.set()
            until(lambda: turns._borrowers)
        return scores

    first = model.autotune.submit(PROMPTS[0], logits_processor=[hold], **LONG)
    requests = [first, *(model.autotune.submit(ids, **LONG) for ids in PROMPTS[1:count])]
    assert begun.wait(60)
    return requests


def engine_of(model: Any) -> Engine:
    found = model.autotune._winner.tuned.variant.engine
    assert isinstance(found, Engine)
    return found


def served_together(model: Any) -> Any:
    """Wrap a model by a plan that was not searched for, for processes without fixtures."""

    def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        variant = Variant(model, traffic, workload).with_transforms(PLANS["together"])
        plan = plans.Plan(Fingerprint("", "", {}, "", "", ""), variant.transforms)
        return Tuned(variant, plan, Report({}), "won")

    with mock.patch.object(tuning, "tune", tune):
        return wrapped(model)


def called(model: Any, ids: list[int], **options: Any) -> list[int]:
    given = torch.tensor([ids])
    found: list[int] = model.generate(given, attention_mask=torch.ones_like(given), **TOKENS, **options)[0].tolist()
    return found


def test_requests_stream_what_generate_answers(model: Any) -> None:
    expected = [called(model, ids, max_new_tokens=20) for ids in PROMPTS]
    requests = [model.autotune.submit(ids, max_new_tokens=20, **TOKENS) for ids in PROMPTS]
    for ids, request, whole in zip(PROMPTS, requests, expected, strict=True):
        assert list(request) == whole[len(ids) :]
        assert request.result().tolist() == [whole]
        assert request.done()


def test_requests_stream_to_an_event_loop(model: Any) -> None:
    expected = [called(model, ids, max_new_tokens=12)[len(ids) :] for ids in PROMPTS[:4]]

    async def ask(ids: list[int]) -> list[int]:
        async with model.autotune.submit(torch.tensor(ids), max_new_tokens=12, **TOKENS) as request:
            return [token async for token in request]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(ask(ids) for ids in PROMPTS[:4]))

    assert asyncio.run(all_of_them()) == expected


def test_a_seed_draws_the_same_tokens_whatever_else_runs(model: Any) -> None:
    options = TOKENS | {"do_sample": True, "temperature": 0.9, "top_k": 30, "max_new_tokens": 20}

    def asked(seed: int, prompt: int = 0) -> Any:
        return model.autotune.submit(PROMPTS[prompt], seed=seed, **options)

    first = asked(7).result().tolist()
    among = [asked(seed, prompt) for seed, prompt in ((1, 1), (7, 0), (2, 0), (7, 2))]
    drawn = [request.result().tolist() for request in among]
    assert drawn[1] == first
    assert drawn[2] != first
    assert len(set(drawn[1][0])) > 5, "it does not sample"


def test_a_task_that_is_cancelled_gives_its_request_up(model: Any) -> None:
    held, requests = Held(after=3), []

    async def ask() -> None:
        async with model.autotune.submit(PROMPTS[0], logits_processor=[held], **LONG) as request:
            requests.append(request)
            async for _ in request:
                if len(request.tokens) == 3:
                    asyncio.current_task().cancel()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(ask())
    held.go_on.set()
    with pytest.raises(CancelledRequestError):
        requests[0].result(30)
    assert len(requests[0].tokens) <= 4


def test_a_cancelled_request_ends(model: Any) -> None:
    held = Held(after=3)
    request = model.autotune.submit(PROMPTS[0], logits_processor=[held], **LONG)
    assert held.started.wait(60)
    request.cancel()
    held.go_on.set()
    with pytest.raises(CancelledRequestError, match="was cancelled"):
        request.result(30)
    assert len(request.tokens) <= 4
    assert model.autotune.status.state in ("tuned", "original")
    assert called(model, PROMPTS[1], max_new_tokens=5) == called(tiny("llama"), PROMPTS[1], max_new_tokens=5)


def test_a_late_request_ends_and_keeps_its_tokens(model: Any) -> None:
    held = Held(after=3)
    request = model.autotune.submit(PROMPTS[0], deadline_s=1e4, logits_processor=[held], **LONG)
    assert held.started.wait(60)
    request.terms.deadline_s = 1e-6  # now it is late, whatever this machine's clock says
    held.go_on.set()
    with pytest.raises(DeadlineError, match=r"passed after [34] new tokens; give more time"):
        request.result(30)
    assert 3 <= len(request.tokens) <= 4
    assert not model.autotune.events


def test_tokens_that_have_not_come_yet_are_counted() -> None:
    """The engine hands tokens on after it has looked at the deadline, and the thread that takes them may be late."""
    request = submit.Submitted(RequestTerms(deadline_s=0.0))
    cut = submit._Cut(request, tokens=2)
    assert cut(5)
    assert "after 3 new tokens" in str(cut.error)


def test_a_request_that_was_late_from_the_start_is_not_computed(model: Any) -> None:
    request = model.autotune.submit(PROMPTS[0], deadline_s=0.0, **LONG)
    with pytest.raises(DeadlineError, match="passed before its first token"):
        request.result(30)


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ("text", {}, "token ids, not text"),
        ([], {}, r"not torch.float64 of shape \[0\]"),
        ([0.5], {}, "not torch.float64"),
        ([[1, 2], [3, 4]], {}, "one prompt, not 2"),
        (object(), {}, "not object"),
        ([1], {"num_beams": 2}, "num_beams=2: a submitted request streams one sequence"),
        ([1], {"num_return_sequences": 3}, "num_return_sequences=3"),
        ([1], {"streamer": print}, "streamer="),
        ([1], {"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ([1], {"generation_config": DRAWN_TWICE}, "num_return_sequences=2"),
        ([1], {"generation_config": GenerationConfig(return_dict_in_generate=True)}, "return_dict_in_generate=True"),
    ],
)
def test_what_is_no_prompt_is_refused(given: Any, options: dict[str, Any], said: str) -> None:
    submissions = submit.Submissions(tiny("llama"), lambda: 1)
    with pytest.raises(WorkloadError, match=said):
        submissions.submit(given, RequestTerms(), options)


def test_the_models_own_settings_count_unless_an_option_overrides_them() -> None:
    model = tiny("llama")
    model.generation_config.num_return_sequences, model.generation_config.do_sample = 2, True
    submissions = submit.Submissions(model, lambda: 1)
    options = {"max_new_tokens": 2, "pad_token_id": PAD}
    with pytest.raises(WorkloadError, match="num_return_sequences=2: a submitted request streams one sequence"):
        submissions.submit(PROMPTS[0], RequestTerms(), options)
    request = submissions.submit(PROMPTS[0], RequestTerms(), options | {"num_return_sequences": 1})
    assert len(list(request)) == 2


def test_several_tokens_at_a_time_are_streamed(model: Any) -> None:
    """Assisted decoding puts all tokens of a step at once, [1, n]."""
    ids = [5, 6, 7, 8] * 6
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12, **TOKENS}
    request = model.autotune.submit(ids, **options)
    assert list(request) == called(tiny("llama"), ids, max_new_tokens=12)[len(ids) :]
    assert request.result(60).shape[1] == len(ids) + 12


def test_a_request_that_is_cancelled_while_it_waits_is_not_computed() -> None:
    held, computed = Held(), list[int]()
    submissions = submit.Submissions(tiny("llama"), lambda: 1)
    options = {"max_new_tokens": 2, "pad_token_id": PAD}

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        computed.append(ids.shape[1])
        return scores

    first = submissions.submit(PROMPTS[0], RequestTerms(), {**options, "logits_processor": [held]})
    assert held.started.wait(60)
    others = [submissions.submit(PROMPTS[1], RequestTerms(), {**options, "logits_processor": [note]}) for _ in range(3)]
    for request in others:
        request.cancel()
    held.go_on.set()
    first.result(60)
    for request in others:
        with pytest.raises(CancelledRequestError):
            request.result(60)
    assert not computed


def test_a_request_that_is_cancelled_while_a_step_is_in_progress_does_not_wait_for_it(model: Any) -> None:
    traffic = model.autotune._tuning._traffic
    with traffic.step():
        request = model.autotune.submit(PROMPTS[0], **LONG)
        until(lambda: traffic._requests)
        request.cancel()
        with pytest.raises(CancelledRequestError):
            request.result(60)
    assert request.tokens == ()


def test_what_generate_raises_comes_out(model: Any) -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.autotune.submit(PROMPTS[0], max_new_tokens=-1).result(30)


def test_urgent_requests_go_first(model: Any) -> None:
    held, order, lock = Held(), list[int](), threading.Lock()
    first = model.autotune.submit(PROMPTS[0], max_new_tokens=2, logits_processor=[held], **TOKENS)
    assert held.started.wait(60)

    def noting(number: int) -> Any:
        def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            with lock:
                if number not in order:
                    order.append(number)
            return scores

        return note

    priorities = [0, 0, 1000, -1000, 1000]
    others = [
        model.autotune.submit(PROMPTS[n], priority=priority, max_new_tokens=2, logits_processor=[noting(n)], **TOKENS)
        for n, priority in enumerate(priorities)
    ]
    if model.autotune._serving.at_once() > 1:  # their threads bring them to the engine
        engine = engine_of(model)
        with engine._changed:
            assert engine._changed.wait_for(lambda: len(engine._waiting) == len(others), 60)
    held.go_on.set()
    for request in (first, *others):
        request.result(60)
    assert order == [2, 4, 0, 1, 3]


def test_no_more_wait_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "MOST_WAITING", 2)
    held, submissions = Held(), submit.Submissions(tiny("llama"), lambda: 1)
    options = {"max_new_tokens": 2, "pad_token_id": PAD}
    first = submissions.submit(PROMPTS[0], RequestTerms(), {**options, "logits_processor": [held]})
    assert held.started.wait(60)
    waiting = [submissions.submit(PROMPTS[1], RequestTerms(), options) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 submitted requests wait"):
        submissions.submit(PROMPTS[1], RequestTerms(), options)
    waiting[0].cancel()
    with pytest.raises(CancelledRequestError):  # it makes room, though the first still holds everything up
        waiting[0].result(60)
    third = submissions.submit(PROMPTS[1], RequestTerms(), options)
    held.go_on.set()
    for request in (first, waiting[1], third):
        assert request.result(60).shape[1] > 1


def test_the_status_tells_what_is_decoded_together(model: Any) -> None:
    held = Held(after=2)
    request = model.autotune.submit(PROMPTS[0], max_new_tokens=5, logits_processor=[held], **TOKENS)
    assert held.started.wait(60)
    said = model.autotune.status.batching
    held.go_on.set()
    request.result(60)
    if model.autotune._serving.pause is None:
        assert said == ""
        return
    assert said.startswith("1 of 4 rows in use, 0 requests wait; 2 steps")
    assert model.autotune.status.batching.endswith("1.0 tokens a step")
    model.autotune.rollback()
    assert model.autotune.status.batching == ""


def test_a_request_that_gets_no_thread_leaves_nothing_behind(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        without_threads(full)
        with pytest.raises(StateError, match="can't start new thread"):
            model.autotune.submit(PROMPTS[0], max_new_tokens=3, **TOKENS)
    assert model.autotune.status.waiting == 0
    request = model.autotune.submit(PROMPTS[0], max_new_tokens=3, **TOKENS)
    assert request.result(60).shape[1] == len(PROMPTS[0]) + 3


@needs_kernels
def test_a_call_is_answered_where_the_engine_gets_no_thread(
    scripted: list[Transform],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted[:] = PLANS["together"]
    model: Any = wrapped(tiny("llama"))
    with monkeypatch.context() as full:
        without_threads(full)
        alone = called(model, PROMPTS[0], max_new_tokens=3)
    assert not engine_of(model)._waiting
    assert (model.autotune.status.state, list(model.autotune.events)) == ("tuned", [])
    again = serving(model.autotune._winner.tuned.variant).generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=3, **TOKENS
    )
    assert again.tolist() == [alone]


@needs_kernels
def test_a_full_queue_is_no_failure_of_the_plan(scripted: list[Transform], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    scripted[:] = PLANS["together"]
    model: Any = wrapped(tiny("llama"))
    monkeypatch.setattr(engine_of(model), "most_waiting", 0)
    with pytest.raises(QueueFullError):
        called(model, PROMPTS[0], max_new_tokens=3)
    assert model.autotune.status.state == "tuned"
    assert not model.autotune.events


@needs_kernels
def test_a_measured_step_has_its_turn_between_the_steps_of_a_busy_engine(
    scripted: list[Transform],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autotune.runtime.traffic.PATIENCE_S", 0.0)
    scripted[:] = PLANS["together"]
    model: Any = wrapped(tiny("llama"))
    expected = called(model, PROMPTS[1], max_new_tokens=10)
    busy = under_way(model, 6)
    served = serving(model.autotune._serving.active)
    with model.autotune._tuning._traffic.step():  # as tuning and the watch take it
        steps = engine_of(model).counts["steps"]
        assert called(served, PROMPTS[1], max_new_tokens=10) == expected
        assert engine_of(model).counts["steps"] == steps
        assert not any(request.done() for request in busy)
    for request in busy:
        assert request.result(60).shape[1] > 150


@needs_kernels
def test_a_step_that_waits_for_the_engine_lets_its_processors_call_the_model(
    scripted: list[Transform],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of `guidance_scale` does at each token."""
    monkeypatch.setattr("autotune.runtime.traffic.PATIENCE_S", 0.0)
    scripted[:] = PLANS["together"]
    model: Any = wrapped(tiny("llama"))
    inside, go_on, waits = threading.Event(), threading.Event(), threading.Event()

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert go_on.wait(60)
        model(ids, output_hidden_states=True)
        return scores

    busy = model.autotune.submit(PROMPTS[0], logits_processor=[ask], max_new_tokens=3, **TOKENS)
    assert inside.wait(60)
    serving_now, engine, measured = model.autotune._serving, engine_of(model), list[bool]()
    pause = serving_now.pause

    def told() -> Any:
        waits.set()
        return pause()

    traffic = model.autotune._tuning._traffic
    traffic.pause_by(lambda: told)

    def measure() -> None:
        with traffic.step():
            measured.append(engine.turns.is_here())

    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    assert waits.wait(60)
    go_on.set()
    assert busy.result(60).shape[1] == len(PROMPTS[0]) + 3
    thread.join(60)
    assert measured == [True]


@needs_kernels
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"return_dict_in_generate": True, "output_scores": True}, None),  # the plan serves it, alone
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_decoded_together_runs_alone_between_two_steps(
    scripted: list[Transform],  # noqa: F811
    options: dict[str, Any],
    reason: str | None,
) -> None:
    scripted[:] = PLANS["together"]
    model: Any = wrapped(tiny("llama"))
    steps, given = list[int](), torch.tensor([PROMPTS[1]])

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)  # in which an engine that went on would make a step
        steps.append(engine_of(model).counts["steps"])
        return scores

    busy = under_way(model, 3)
    found = model.generate(given, logits_processor=[note], max_new_tokens=8, **TOKENS | {"do_sample": False}, **options)
    for request in busy:
        assert request.result(60).shape[1] > 150
    assert len(steps) == 8
    assert len(set(steps)) == 1, steps
    assert steps[0] < engine_of(model).counts["steps"], "nobody was under way"
    plain = tiny("llama").generate(given, max_new_tokens=8, **TOKENS | {"do_sample": False}, **options)
    ids, expected = (each if isinstance(each, torch.Tensor) else each.sequences for each in (found, plain))
    assert torch.equal(ids, expected)
    assert model.autotune.status.bypassed == ({} if reason is None else {reason: 1})


@needs_kernels
def test_a_processor_in_the_engines_thread_may_call_the_model(scripted: list[Transform]) -> None:  # noqa: F811
    scripted[:] = PLANS["together"]
    model: Any = wrapped(tiny("llama"))
    asked = list[list[int]]()

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        asked.append(called(model, PROMPTS[2], max_new_tokens=3))
        model(ids, output_hidden_states=True)
        return scores

    expected = called(model, PROMPTS[1], max_new_tokens=3)
    assert model.autotune.submit(PROMPTS[1], logits_processor=[ask], max_new_tokens=3, **TOKENS).result(
        60
    ).tolist() == [expected]
    assert asked == [called(tiny("llama"), PROMPTS[2], max_new_tokens=3)] * 3


@needs_kernels
@pytest.mark.slow
def test_plans_switch_under_the_load_of_many_threads(scripted: list[Transform]) -> None:  # noqa: F811
    """1,000 calls of 32 threads, and another plan every 50 ms: each is answered, by one plan from end to end."""
    scripted[:] = PLANS["together"]
    model: Any = wrapped(tiny("llama"))
    by_plan = [called(model, ids, max_new_tokens=12) for ids in PROMPTS]
    model.autotune.rollback()
    by_original = [called(model, ids, max_new_tokens=12) for ids in PROMPTS]
    assert by_plan != by_original
    numbers, over, switches = [k % len(PROMPTS) for k in range(1000)], threading.Event(), [0]

    def switch() -> None:
        while not over.wait(0.05):
            (model.autotune.rollback if switches[0] % 2 else model.autotune.commit)()
            switches[0] += 1

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        with ThreadPoolExecutor(32) as pool:
            calls = [pool.submit(called, model, PROMPTS[n], max_new_tokens=12) for n in numbers]
            answers = [call.result(240) for call in calls]
    finally:
        over.set()
        switching.join()
    assert switches[0] > 5
    odd = [n for n, got in zip(numbers, answers, strict=True) if got not in (by_plan[n], by_original[n])]
    assert not odd
    served = model.autotune.status.served
    assert 50 < served < 1000, "both served"
    assert not model.autotune.events


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_wait_for_the_parents_requests(model: Any) -> None:
    held = Held()
    request = model.autotune.submit(PROMPTS[0], max_new_tokens=2, logits_processor=[held], **TOKENS)
    assert held.started.wait(60)
    if (child := os.fork()) == 0:
        try:
            request.result(5)
        except StateError:
            os._exit(0)
        finally:
            os._exit(1)
    held.go_on.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert request.result(60).shape[1] == len(PROMPTS[0]) + 2


SPAWNED = """
import multiprocessing, sys
import torch
from tests.live.test_submit import PROMPTS, called, served_together
from tests.models import tiny

def child(model, answers):
    answers.put(called(model, PROMPTS[0], max_new_tokens=8))

if __name__ == "__main__":
    model = served_together(tiny("llama"))
    model.autotune.submit(PROMPTS[1], max_new_tokens=100, do_sample=False)
    spawning = multiprocessing.get_context("spawn")
    answers = spawning.Queue()
    process = spawning.Process(target=child, args=(model, answers))
    process.start()
    assert answers.get(timeout=120) == called(tiny("llama"), PROMPTS[0], max_new_tokens=8)
    process.join()
    sys.exit(process.exitcode)
"""


@needs_kernels
def test_a_spawned_process_gets_the_plain_model(tmp_path: Path) -> None:
    (tmp_path / "spawned.py").write_text(SPAWNED)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, tmp_path / "spawned.py"],
        env=os.environ | {"PYTHONPATH": root, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


LOADED = """
import atexit, sys, threading, time
atexit.register(time.sleep, {late})  # the last to be called: after autotune's threads have ended
import torch
import autotune
from autotune.machine import ending
from tests.live.test_submit import LONG, served_together
from tests.models import tiny, token_prompts

model = served_together(tiny("llama"))
requests = [model.autotune.submit(prompt, **LONG) for prompt in token_prompts(8)]

def call():
    while {late} and not ending.ends():
        time.sleep(0.01)
    while True:
        model.generate(torch.tensor([token_prompts(1)[0]]), **LONG)

for _ in range(4):
    threading.Thread(target=call, daemon=True).start()
next(iter(requests[0]))
sys.exit(3)
"""


@needs_kernels
@pytest.mark.parametrize("late", [0, 1], ids=["callers under way", "callers that come too late"])
def test_a_process_ends_in_order_under_load(late: int) -> None:
    done = run(LOADED.format(late=late))
    assert (done.returncode, noise(done)) == (3, "")


POOLED = """
import threading
from concurrent.futures import ThreadPoolExecutor
import torch
from autotune.machine import ending
from tests.live.test_submit import TOKENS, called, served_together
from tests.models import tiny, token_prompts

model, begun = served_together(tiny("llama")), threading.Event()

def hold(ids, scores):
    begun.set()
    while not ending.ends():
        pass
    return scores

def tell(count):
    print(f"{count} ", end="")  # at once: another thread's number may not come before the blank

def ask(ids, **options):
    tell(len(called(model, ids, max_new_tokens=30, **options)) - len(ids))

pool = ThreadPoolExecutor(2)
for ids in token_prompts(3):  # the last one begins while the process ends
    pool.submit(ask, ids, logits_processor=[hold])
pool.submit(lambda: tell(len(model.autotune.submit(token_prompts(1)[0], max_new_tokens=5, **TOKENS).result()[0])))
begun.wait()
"""


@needs_kernels
def test_a_process_ends_after_what_its_executors_ask_for() -> None:
    """Python waits for their threads, which would wait for an engine that has ended."""
    done = run(POOLED)
    said = sorted(done.stdout.split(), key=int)
    assert (done.returncode, said, noise(done)) == (0, [str(len(PROMPTS[0]) + 5), "30", "30", "30"], "")


def test_terms_grow_old() -> None:
    """However many urgent requests come later, one that waited long enough goes first."""
    old = RequestTerms(priority=0, arrived_s=0.0)
    assert RequestTerms(priority=5, arrived_s=4.9).order < old.order < RequestTerms(priority=5, arrived_s=5.1).order


def test_ids_are_tokens() -> None:
    assert submit.one_prompt([VOCABULARY - 1]).tolist() == [[VOCABULARY - 1]]
    assert submit.one_prompt(torch.tensor([[1, 2]], dtype=torch.int32)).dtype == torch.int64
