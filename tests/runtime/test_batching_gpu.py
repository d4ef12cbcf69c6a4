"""The engine on a GPU that is not there: per-row slots and captured steps, and each caller gets its own answer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteriaList

from autotune.errors import CancelledRequestError, DeviceError, TransformError, VariantError
from autotune.live.original import Original
from autotune.machine import device
from autotune.runtime.batching.engine import Engine
from autotune.runtime.batching.prefill import Prefill
from autotune.runtime.batching.prefixes import Prefixes
from autotune.runtime.batching.request import Request
from autotune.runtime.batching.terms import CURRENT, RequestTerms
from autotune.runtime.cache.rows import RowCache
from autotune.runtime.cache.slots import SlotCache
from autotune.runtime.dispatch import serving
from autotune.runtime.speculation.pace import evenly
from autotune.runtime.steps.compiled import CompiledStep
from autotune.runtime.steps.graphs import GraphSteps
from autotune.runtime.steps.waiting import _Watch
from autotune.runtime.traffic import Traffic
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.compile_step import CompileStep
from autotune.transforms.continuous_batching import ContinuousBatching
from autotune.transforms.cuda_graph import CudaGraph
from autotune.transforms.speculation import Speculation
from autotune.transforms.static_cache import StaticCache
from autotune.workload import Workload
from tests.fakes.cuda import FakeCuda
from tests.models import tiny, token_prompts
from tests.runtime.test_batching import (
    ARRIVAL,
    ROWS,
    SHAPES,
    Arrival,
    Round,
    Streamer,
    answer,
    broken_after,
    engine_of,
    prompt,
    require_nan_hurts_alone,
    require_others_unhurt,
    require_own_answers,
    until_waiting,
)
from tests.runtime.test_captures import turns_of

GRAPH = CudaGraph("decode", shortest=32, slots=128)
COMPILED = CompileStep("decode", slots=64)
TOGETHER = ContinuousBatching("decode", rows=ROWS)
PLANS: dict[str, list[Transform]] = {"graphs": [GRAPH], "eager": [StaticCache("decode", slots=128)]}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeCuda]:
    fake = FakeCuda()
    with device.stand_in(fake):
        yield fake


def made(plan: str = "graphs", arch: str = "llama", traffic: Traffic | None = None) -> Variant:
    work = Workload(tuple(map(tuple, token_prompts(4))), 12, (1,))
    return Variant(tiny(arch), traffic, work).with_transforms([*PLANS[plan], TOGETHER])


@pytest.fixture(scope="module")
def variant(fake: FakeCuda) -> Variant:
    return made()


@pytest.fixture(scope="module")
def alone(fake: FakeCuda) -> Variant:
    return Variant(tiny("llama")).with_transforms(PLANS["eager"])


def steps_of(variant: Variant) -> GraphSteps:
    assert isinstance(variant.step, GraphSteps)
    return variant.step


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt-neox", "mistral-window"])
@pytest.mark.parametrize("plan", PLANS)
def test_callers_get_their_own_answers(plan: str, arch: str, fake: FakeCuda) -> None:
    """More callers than rows, over two boundaries between lengths and beyond the windows."""
    shared = made(plan, arch)
    single = Variant(tiny(arch)).with_transforms(PLANS["eager"])
    work = [(prompt(length, seed), tokens) for seed, (length, tokens) in enumerate(SHAPES)]
    expected = [answer(serving(single), ids, tokens) for ids, tokens in work]
    captures, replays, engine = fake.captures, fake.replays, engine_of(shared)
    with ThreadPoolExecutor(len(work)) as pool:
        with engine.alone():  # until all have come
            asked = [pool.submit(answer, serving(shared), *item) for item in work]
            until_waiting(engine, len(work))
        assert [each.result() for each in asked] == expected
    counts = engine.counts
    assert fake.captures == captures, "a request captured"
    assert counts["requests"] == len(work)
    assert counts["tokens"] > 2 * counts["steps"], "hardly anything was decoded together"
    if plan == "graphs":
        assert fake.replays - replays == counts["steps"]
        assert not steps_of(shared).fallbacks


def test_a_step_is_captured_for_every_number_of_rows_and_length(fake: FakeCuda) -> None:
    shared = made()
    caches = engine_of(shared).caches
    assert {(rows, read) for rows, cache in caches.items() for read in steps_of(shared).reads(cache)} == set(
        product((1, 2, 4), (32, 64, 128))
    )
    assert TOGETHER.took_effect(shared) is None


def test_a_cache_of_rows_has_a_layout_of_its_own(alone: Variant) -> None:
    """Compiled steps are found by layout, and check nothing: that of a batch writes one slot for all of it."""
    example = alone.example(2)
    caches = SlotCache(example, 64), RowCache(example, 64, 2), RowCache(example, 64, 4).upper(2)
    layouts = [cache.layout[:-1] for cache in caches]
    assert layouts == [(2, 64, 64, 1), (2, 64, 64, 2), (2, 64, 64, 2)]
    narrow = SlotCache(example, 64, dtype=torch.float16)
    assert narrow.layout[:-1] == layouts[0]
    assert narrow.layout != caches[0].layout  # the code for one would write past the other's slots


@settings(max_examples=15, deadline=None)
@given(st.lists(ARRIVAL, min_size=2, max_size=12))
def test_whenever_requests_come_each_gets_the_answer_it_would_get_alone(
    variant: Variant, alone: Variant, arrivals: list[Arrival]
) -> None:
    """Join and leave between steps, greedy and sampled by a seed; urgent ones take rows from others."""
    require_own_answers(variant, alone, arrivals)
    assert not steps_of(variant).fallbacks


def test_sampling_uses_the_callers_settings_and_numbers(variant: Variant, alone: Variant) -> None:
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2}
    torch.manual_seed(7)
    expected = answer(serving(alone), prompt(10), 16, **options)
    torch.manual_seed(7)
    assert answer(serving(variant), prompt(10), 16, **options) == expected


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"logits_processor": broken_after(4)}, ZeroDivisionError),
        ({"stopping_criteria": StoppingCriteriaList([lambda ids, scores: 1 / 0])}, ZeroDivisionError),
        ({"logits_processor": [lambda ids, scores: scores * torch.inf], "do_sample": True}, RuntimeError),
    ],
    ids=["processor", "criterion", "no probabilities"],
)
def test_a_row_that_fails_fails_alone(
    variant: Variant, alone: Variant, options: dict[str, Any], error: type[Exception]
) -> None:
    require_others_unhurt(variant, alone, options, error)


def test_rows_with_nan_fail_alone(variant: Variant, alone: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    require_nan_hurts_alone(variant, alone, monkeypatch)


def test_a_caller_that_goes_frees_its_row(variant: Variant, alone: Variant) -> None:
    with pytest.raises(ConnectionError):
        answer(serving(variant), prompt(9), 80, streamer=Streamer(most=15))
    assert answer(serving(variant), prompt(6), 20) == answer(serving(alone), prompt(6), 20)
    assert engine_of(variant).sequences.rows == [None] * ROWS


@pytest.mark.parametrize("has_room", [True, False])
def test_urgent_requests_take_rows_if_memory_has_room_for_what_was_in_them(
    variant: Variant, alone: Variant, has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(variant)
    logits, counts, later = engine.sequences.logits, engine.counts.copy(), list[Future[list[int]]]()

    def ask(ids: list[int], tokens: int, priority: int) -> list[int]:
        CURRENT.set(RequestTerms(priority))
        return answer(serving(variant), ids, tokens)

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if not has_room:
        monkeypatch.setattr(RowCache, "copy_of", no_room)
    with ThreadPoolExecutor(8) as pool:

        def when_full() -> torch.Tensor:
            if None not in engine.sequences.rows and not later:
                later.append(pool.submit(ask, prompt(33), 12, 3600))
                until_waiting(engine, 1)
            return logits()

        monkeypatch.setattr(engine.sequences, "logits", when_full)
        with engine.alone():
            patient = [pool.submit(ask, prompt(9 + seed, seed), 40, 0) for seed in range(ROWS)]
            until_waiting(engine, ROWS)
        got = [each.result() for each in patient]
    assert got == [answer(serving(alone), prompt(9 + seed, seed), 40) for seed in range(ROWS)]
    assert later[0].result() == answer(serving(alone), prompt(33), 12)
    assert engine.counts["evicted"] - counts["evicted"] == has_room


def test_the_host_waits_once_a_step(variant: Variant, fake: FakeCuda) -> None:
    """For the tokens of all rows, greedy and sampled ones, however their number; nothing else reads the device."""
    engine, found = engine_of(variant), list[tuple[int, list[str]]]()
    step, waits = engine.sequences.step, list[int]()

    def watched() -> None:
        before = fake.waits
        with _Watch() as watch:
            step()
        waits.append(fake.waits - before)
        found.append((engine.sequences.used, watch.found))

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(engine.sequences, "step", watched)
        with engine.alone():
            options = [{}, {"do_sample": True, "temperature": 0.5}, {"repetition_penalty": 1.3}]
            asked = [pool.submit(answer, serving(variant), prompt(9, n), 12, **each) for n, each in enumerate(options)]
            until_waiting(engine, 3)
        for each in asked:
            each.result()
    assert len(found) > 10
    assert set(waits) == {1}
    assert not [names for _, names in found if names]


def test_no_caller_s_ids_are_read_before_they_are_made(variant: Variant, fake: FakeCuda) -> None:
    """A caller's stream may not have made them yet: the engine waits for what it had queued."""
    queued, waited = list[Any](), list[Any]()
    engine, mark, wait = engine_of(variant), fake.mark, fake.wait
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake, "mark", lambda: queued.append(mark()) or queued[-1])
        patch.setattr(fake, "wait", lambda mark: (waited.append(mark), wait(mark)))
        with ThreadPoolExecutor(1) as pool, engine.alone():
            asked = pool.submit(answer, serving(variant), prompt(9), 4)
            until_waiting(engine, 1)
            (of_the_caller,) = queued
        asked.result()
    assert of_the_caller in waited


def test_a_prompt_that_is_given_up_is_waited_for(
    variant: Variant, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was queued for it reads the caller's ids, which the caller frees."""
    terms, waits = RequestTerms(), list[int]()
    advance, fail = Prefill.advance, Request.fail

    def cancelled(*given: Any) -> Any:
        found = advance(*given)
        terms.cancelled = True
        waits.append(fake.waits)
        return found

    def noted(*given: Any) -> None:
        waits.append(fake.waits)
        fail(*given)

    monkeypatch.setattr(Prefill, "advance", cancelled)
    monkeypatch.setattr(Request, "fail", noted)
    monkeypatch.setattr(engine_of(variant), "prefixes", Prefixes(8))
    reset = CURRENT.set(terms)
    try:
        with pytest.raises(CancelledRequestError):
            answer(serving(variant), prompt(30), 4)
    finally:
        CURRENT.reset(reset)
    after_a_part, at_the_end = waits
    assert at_the_end == after_a_part + 1


@pytest.mark.parametrize("what", ["step", "replay"])
def test_a_step_that_fails_fails_its_sequences_and_no_later_one(
    what: str, fake: FakeCuda, alone: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = made()
    calls, real = [], GraphSteps._replayed

    def failing(*given: Any) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 5:
            raise RuntimeError("no such kernel") if what == "step" else torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    monkeypatch.setattr(GraphSteps, "_replayed", failing)
    if what == "step":
        with pytest.raises(VariantError, match="no such kernel"):
            answer(serving(shared), prompt(5), 20)
    expected = answer(serving(alone), prompt(5), 20)
    assert answer(serving(shared), prompt(5), 20) == expected
    assert dict(steps_of(shared).fallbacks) == ({} if what == "step" else {"out of memory": 15})


def test_a_device_that_dies_ends_all_requests(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose rows can no longer be freed."""
    own = FakeCuda()
    with device.stand_in(own):
        shared = made()
        engine, calls, leave = engine_of(shared), list[int](), RowCache.leave

        def dead(*given: Any) -> None:
            if calls:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            leave(*given)

        def dying(*given: Any) -> torch.Tensor:
            calls.append(0)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(RowCache, "leave", dead)
        monkeypatch.setattr(GraphSteps, "_replayed", dying)
        with ThreadPoolExecutor(ROWS + 2) as pool:
            with engine.alone():
                asked = [pool.submit(answer, serving(shared), prompt(5, seed), 20) for seed in range(ROWS + 2)]
                until_waiting(engine, ROWS + 2)
            for each in asked:
                assert isinstance(each.exception(60), DeviceError)


@pytest.mark.parametrize("end", ["rejected", "dropped"])
def test_an_engine_s_caches_and_graphs_end_with_it(end: str, fake: FakeCuda, alone: Variant) -> None:
    """A plan that served without it goes on, over its own graphs."""
    winner = Variant(tiny("llama")).with_transforms(PLANS["graphs"])
    shared = winner.with_transform(TOGETHER)
    expected = answer(serving(alone), prompt(9), 8)
    assert answer(serving(shared), prompt(9), 8) == expected
    caches = list(engine_of(shared).caches.values())
    gone = [weakref.ref(held) for held in (*caches, *caches[-1].keys, *caches[-1].values)]
    gone += [weakref.ref(graph) for cache in caches for graph in steps_of(shared)._graphs[cache].values()]
    free = fake.free_bytes
    worker = engine_of(shared)._worker
    del shared, caches
    if worker is not None:
        worker.join(20)
    del worker
    if end == "dropped":
        del winner
    gc.collect()
    assert not [each for each in gone if each() is not None]
    if end == "rejected":
        assert answer(serving(winner), prompt(9), 8) == expected
    else:
        assert fake.free_bytes > free, "the graphs' memory"


def test_every_capture_has_a_turn(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the weights have moved, and an engine that has served goes on."""
    traffic = Traffic()
    with turns_of(fake, traffic, monkeypatch) as turns:
        shared = made(traffic=traffic)
        assert len(turns) == 3 * 2 + 3 * 3, "three lengths, of two caches for one caller and of three numbers of rows"
        assert None not in turns
        assert len(set(turns)) == len(turns), "requests wait for one capture at most"
        expected = answer(serving(shared), prompt(9), 8)
        turns.clear()
        with traffic.step():
            Original(shared.original).release(shared)
        assert len(turns) == 15
        assert None not in turns
        shared.traffic = None
        assert answer(serving(shared), prompt(9), 8) == expected
        assert len(turns) == 15


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (8, "the decode step of 2 rows cannot be captured: RuntimeError: not now"),
        (3, "the decode step of 1 rows cannot be captured: no capture is tried after one that failed"),
    ],
)
def test_rows_that_cannot_be_captured_are_refused(
    fails: int, said: str, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures, capture = list[int](), fake.capture

    def failing(*given: Any) -> Any:
        captures.append(0)
        if len(captures) == fails:
            raise RuntimeError("not now")
        return capture(*given)

    monkeypatch.setattr(torch, "__version__", "2.13.0")  # where none is tried after one that failed
    monkeypatch.setattr(fake, "capture", failing)
    with pytest.raises(TransformError, match=said):
        made()


def test_a_replay_that_takes_one_position_for_all_rows_is_found(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a capture froze shows because its first replay has other lengths, which differ by row."""
    look = GraphSteps._uncompiled

    def frozen(self: GraphSteps, token: torch.Tensor, position: torch.Tensor, part: Any) -> torch.Tensor:
        if part.slot.shape[0] > 1 and getattr(fake._local, "capturing", False):
            position = position[:1].expand_as(position)
        return look(self, token, position, part)

    monkeypatch.setattr(GraphSteps, "_uncompiled", frozen)
    with pytest.raises(TransformError, match="other logits"):
        made(arch="gpt-neox")


@pytest.mark.parametrize("plan", PLANS)
def test_a_sequence_alone_is_guessed_ahead_and_one_beside_others_is_not(
    plan: str, fake: FakeCuda, alone: Variant
) -> None:
    """Its checks are replayed over its row, and what wrong guesses leave there hurts neither it nor the next one."""
    single = Variant(tiny("llama")).with_transforms([*PLANS[plan], Speculation("decode", tokens=3)])
    speculation = single.speculation
    assert speculation is not None
    speculation.costs = evenly(speculation.tokens, 1.1)
    shared = single.with_transform(TOGETHER)
    options: dict[str, Any] = {"logits_processor": [Round()]}
    work = [(prompt(20), 60), (prompt(11, 1), 9), (prompt(33, 2), 20)]
    expected = [answer(serving(alone), *item, **options) for item in work]
    counts, checks, captures, replays = (
        engine_of(shared).counts,
        speculation.stride.several,
        fake.captures,
        fake.replays,
    )
    assert (checks is not None) is (plan == "graphs")
    for _ in range(2):
        assert answer(serving(shared), *work[0], **options) == expected[0]
    assert speculation.tally.right > 60
    assert counts["steps"] < 40
    if checks is not None:
        assert fake.replays - replays == counts["steps"] + speculation.tally.steps
        assert not checks.fallbacks
    before = counts["steps"]
    asked = list[Future[Any]]()
    with ThreadPoolExecutor(3) as pool:
        with engine_of(shared).alone():
            for item in work:  # the first is the longest: it is never alone again before the others are done
                asked.append(pool.submit(answer, serving(shared), *item, **options))
                until_waiting(engine_of(shared), len(asked))
        assert [each.result() for each in asked] == expected
    assert counts["steps"] - before >= 19, "beside others, tokens come one by one"
    assert fake.captures == captures, "a request captured"
    Original(shared.original).release(shared)
    assert answer(serving(shared), *work[0], **options) == expected[0]
    assert checks is None or not checks.fallbacks


REFUSED: dict[str, tuple[list[Transform], str]] = {
    "no slots": ([], r"needs a captured decode step \(cuda_graph\), or a static cache"),
}


@pytest.mark.parametrize("plan", REFUSED)
def test_why_callers_are_served_one_at_a_time(plan: str, fake: FakeCuda) -> None:
    transforms, said = REFUSED[plan]
    with pytest.raises(TransformError, match=said):
        Variant(tiny("llama")).with_transforms(transforms).with_transform(TOGETHER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain", [[CompileStep("decode", slots=64)], [CompileStep("decode", slots=64), GRAPH]], ids=str
)
def test_a_compiled_step_is_compiled_for_rows_too(chain: list[Transform], alone: Variant) -> None:
    """The one that was compiled for a caller's batch writes a slot for all of it."""
    with device.stand_in(FakeCuda(opaque=True)):
        work = Workload(tuple(map(tuple, token_prompts(4))), 12, (2,))
        shared = Variant(tiny("llama"), workload=work).with_transforms([*chain, ContinuousBatching("decode", rows=2)])
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(lambda n: answer(serving(shared), prompt(7 + 9 * n, n), 12), range(2)))
    assert got == [answer(serving(alone), prompt(7 + 9 * n, n), 12) for n in range(2)]
    compiled = shared.step.inner if isinstance(shared.step, GraphSteps) else shared.step
    assert isinstance(compiled, CompiledStep)
    assert all(compiled.fitting(cache) for cache in engine_of(shared).caches.values())


def test_prompts_in_parts_and_together_give_the_same(
    variant: Variant, alone: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Engine = engine_of(variant)
    monkeypatch.setattr(engine, "prefixes", Prefixes(16))
    for length in (15, 16, 17, 60):
        assert answer(serving(variant), prompt(length), 8) == answer(serving(alone), prompt(length), 8)
    monkeypatch.setattr(engine, "prefixes", Prefixes(128))
    monkeypatch.setattr(engine, "joins", True)
    before, prompts = engine.counts.copy(), [prompt(length, seed=5) for length in (40, 33, 64, 51)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        with engine.alone():
            asked = [pool.submit(answer, serving(variant), ids, 8) for ids in prompts]
            until_waiting(engine, len(prompts))
        got = [each.result() for each in asked]
    assert got == [answer(serving(alone), ids, 8) for ids in prompts]
    assert engine.counts["prefills"] - before["prefills"] == 1
