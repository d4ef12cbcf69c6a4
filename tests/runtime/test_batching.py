"""Sequences of several callers are decoded together, and each gets the answer that it would get alone."""

from __future__ import annotations

import gc
import random
import threading
import time
import types
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from autotune.errors import QueueFullError, TransformError, VariantError
from autotune.live.original import Original
from autotune.model import seam
from autotune.runtime import kernels
from autotune.runtime.batching import joined, prefill, prefixes, rows
from autotune.runtime.batching.engine import Engine
from autotune.runtime.batching.prefill import Prefill
from autotune.runtime.batching.prefixes import Prefixes
from autotune.runtime.batching.request import Request
from autotune.runtime.batching.terms import CURRENT, RequestTerms
from autotune.runtime.batching.tokens import HostTokens
from autotune.runtime.cache.rows import RowCache
from autotune.runtime.cache.slots import SlotCache
from autotune.runtime.dispatch import serving
from autotune.runtime.speculation.drafts import PromptLookup
from autotune.runtime.speculation.pace import evenly
from autotune.runtime.speculation.strides import MultiTokenStep
from autotune.runtime.steps.program import StepPrograms
from autotune.runtime.steps.program.program import Program
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.continuous_batching import ContinuousBatching
from autotune.transforms.fused_layers import FusedLayers
from autotune.transforms.half_cache import HalfCache
from autotune.transforms.linear_bf16 import LinearBf16
from autotune.transforms.packed_prefill import PackedPrefill
from autotune.transforms.prefill_attention import PrefillAttention
from autotune.transforms.speculation import Speculation
from autotune.transforms.step_program import StepProgram
from autotune.transforms.weight_only import WeightOnly
from autotune.transforms.weight_storage import WeightStorage
from tests.models import PAD, VOCABULARY, tiny

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

needs_kernels = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
SLOTS, ROWS = 96, 4
STEP = (WeightOnly("decode"), StepProgram("decode", slots=SLOTS))


# Which rows are computed


@pytest.mark.parametrize(
    ("used", "most", "size", "moved"),
    [
        ("", 4, 1, []),
        ("x", 4, 1, []),
        ("xx", 4, 2, []),
        ("xxx", 4, 4, []),
        (".x", 4, 2, [(1, 0)]),
        ("...x", 4, 4, [(3, 0)]),
        ("x..x", 4, 4, [(3, 1)]),
        ("x.xx", 4, 4, []),  # three sequences take a step of four rows anyhow
        ("x....", 5, 1, []),
        ("x...x", 5, 5, [(4, 1)]),
        ("xxxxx", 6, 6, []),
    ],
)
def test_a_step_computes_few_rows(used: str, most: int, size: int, moved: list[tuple[int, int]]) -> None:
    taken = [letter == "x" for letter in used.ljust(most, ".")]
    assert rows.size_for(taken, most) == size
    assert rows.moves(taken, most) == moved


@given(st.integers(2, 64).flatmap(lambda most: st.lists(st.booleans(), min_size=most, max_size=most)))
def test_moves_make_the_step_as_small_as_can_be(taken: list[bool]) -> None:
    most, count = len(taken), sum(taken)
    for source, target in rows.moves(taken, most):
        assert taken[source]
        assert not taken[target]
        taken[source], taken[target] = False, True
    assert sum(taken) == count
    assert rows.size_for(taken, most) == next(s for s in rows.sizes(most) if s >= max(count, 1))


# Slots of each row's own


def filled(model: Any, ids: list[int]) -> Any:
    cache = seam.growing_cache()
    with torch.no_grad():
        model(torch.tensor([ids]), **seam.over(model, cache))
    return cache


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mistral-window", "gpt2"])
def test_a_row_computes_what_it_would_alone(arch: str) -> None:
    from autotune.runtime.cache import slot_forward

    model = tiny(arch)
    prompts = [prompt(length, seed=length) for length in (3, 20, 11)]
    caches = [filled(model, ids[:-1]) for ids in prompts]
    together = RowCache(caches[0], SLOTS, 4)
    for row, cache in zip((0, 1, 3), caches, strict=True):  # row 2 is free
        together.join(row, cache)
    together.move(3, 2)
    token = torch.tensor([[ids[-1]] for ids in prompts] + [[0]])
    with torch.no_grad():
        for _ in range(6):
            got = slot_forward.step(model, token, together.slot[:, None], together)
            together.advance()
            for row, cache in enumerate(caches):
                expected = seam.logits(model(token[row : row + 1], **seam.over(model, cache)))[:, -1]
                torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-4, atol=1e-4)
            token[:3] = got[:3].argmax(-1, keepdim=True)
    assert together.lengths == [8, 25, 16, 0]
    assert torch.isfinite(got).all()


def test_what_a_sequence_left_behind_does_not_harm_the_next() -> None:
    from autotune.runtime.cache import slot_forward

    model = tiny("llama")
    short, long = filled(model, prompt(4)), filled(model, prompt(40))
    cache = RowCache(long, SLOTS, 2)
    cache.join(0, long)
    for held in (*cache.keys, *cache.values):
        held[0, :, :41] = torch.nan
    cache.leave(0)
    cache.join(0, short)
    with torch.no_grad():
        logits = slot_forward.step(model, torch.tensor([[5], [0]]), cache.slot[:, None], cache)
    assert torch.isfinite(logits[0]).all()


# The engine


@pytest.fixture(scope="module")
def variant() -> Variant:
    return Variant(tiny("llama")).with_transforms((*STEP, ContinuousBatching("decode", rows=ROWS)))


@pytest.fixture(scope="module")
def alone() -> Variant:
    return Variant(tiny("llama")).with_transforms(STEP)


def engine_of(variant: Variant) -> Engine:
    assert isinstance(variant.engine, Engine)
    return variant.engine


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(100 * length + seed).randrange(3, VOCABULARY) for _ in range(length)]


def answer(served: Any, ids: Sequence[int], tokens: int, **options: Any) -> list[int]:
    given = torch.tensor([list(ids)])
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": PAD} | options
    found: list[int] = served.generate(given, attention_mask=torch.ones_like(given), **options)[0].tolist()
    return found


def until_waiting(engine: Engine, count: int) -> None:
    while len(engine._waiting) < count:
        time.sleep(0.001)


class Streamer:
    """Remembers tokens and the threads in which they came; raises after `most` of them."""

    def __init__(self, most: int = 1000) -> None:
        self.most, self.tokens, self.threads = most, list[int](), set[int]()
        self.ended = self.never_waits = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()
        self.threads.add(threading.get_ident())
        if len(self.tokens) > self.most:
            raise ConnectionError("the client went")

    def end(self) -> None:
        self.ended = True


@needs_kernels
@pytest.mark.parametrize(
    "weights",
    [
        [],
        [WeightStorage("decode", "float16")],
        [WeightOnly("decode", bits=8)],
        [WeightOnly("decode", bits=4)],
        [HalfCache("decode")],
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_a_rows_logits_are_the_same_to_the_bit_whoever_is_beside_it(arch: str, weights: list[Transform]) -> None:
    """In every size of step, at every row, beside every neighbour: the sums run in one order."""
    made = Variant(tiny(arch)).with_transforms([*weights, StepProgram("decode", slots=SLOTS)])
    dtype = made.slot_dtype
    caches = [filled(made.original, prompt(length, seed=length)) for length in (3, 70, 11, 40, 64, 5, 33, 20)]
    tokens = torch.tensor([[7 + row] for row in range(len(caches))])

    def logits(rows: list[int]) -> torch.Tensor:
        together = RowCache(caches[0], SLOTS, len(rows), dtype)
        for at, row in enumerate(rows):
            together.join(at, caches[row])
        step = made.step.fitting(together) if made.step is not None else None
        assert step is not None
        with torch.no_grad(), made.running("decode"):
            return step(tokens[rows], together.slot[:, None], together).clone()

    alone = torch.cat([logits([row]) for row in range(len(caches))])
    for among in ([0, 1], [1, 0], [3, 2, 1, 0], [4, 5, 6, 7], list(range(8)), list(reversed(range(8)))):
        assert torch.equal(logits(among), alone[among]), among


@needs_kernels
@pytest.mark.parametrize(
    "weights",
    [
        [],
        [WeightStorage("decode", "float16")],
        [WeightOnly("decode")],
        [WeightOnly("decode", bits=4)],
        [HalfCache("decode")],
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "mistral-window"])
def test_several_tokens_of_a_sequence_are_those_of_one_after_the_other_to_the_bit(
    arch: str, weights: list[Transform]
) -> None:
    """From a slot cache of a generation and from a row beside others, in steps of every prepared size."""
    made = Variant(tiny(arch)).with_transforms([*weights, StepProgram("decode", slots=SLOTS)])
    steps, filled_cache = made.step, filled(made.original, prompt(21))
    assert isinstance(steps, StepPrograms)
    dtype = made.slot_dtype
    for count in (2, 4, 8):
        steps.prepare_several(partial(RowCache, filled_cache, SLOTS, count, dtype))
    tokens, stride = torch.tensor([prompt(9, seed=1)]), MultiTokenStep(made.modules["decode"], recorded=steps)
    one = SlotCache(filled_cache, SLOTS, dtype=dtype)
    one.fill(filled_cache, None)
    single, expected = steps.fitting(one), []
    for k in range(9):
        expected.append(single(tokens[:, k : k + 1], torch.tensor([[21 + k]]), one).clone())
        one.advance()
    for count in (2, 3, 4, 5, 8):
        among = RowCache(filled_cache, SLOTS, 3, dtype)
        among.join(0, filled(made.original, prompt(7)))
        among.join(1, filled_cache)
        again = SlotCache(filled_cache, SLOTS, dtype=dtype)
        again.fill(filled_cache, None)
        for cache in (again, among.single(1)):
            assert steps.several(count, cache) is not None
            got = stride.steps(tokens[:, :count], torch.arange(21, 21 + count)[None], cache)
            assert torch.equal(got[0], torch.cat(expected[:count])), count
    assert steps.several(9, again) is None
    again.advance(SLOTS - 21 - 3)
    assert steps.several(2, again) is not None
    assert steps.several(4, again) is None, "there is no room for four"
    steps.forget()
    assert steps.several(2, again) is not None, "it is recorded again"


@pytest.fixture(scope="module")
def guesser() -> Variant:
    """An engine whose plan guesses, and believes that guesses pay."""
    made = Variant(tiny("llama")).with_transforms((*STEP, Speculation("decode", tokens=3)))
    assert made.speculation is not None
    made.speculation.costs = evenly(made.speculation.tokens, 1.1)
    return made.with_transform(ContinuousBatching("decode", rows=ROWS))


class Round(LogitsProcessor):
    """Makes the answer go round the prompt's first tokens, except at every eighth."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        at = input_ids.shape[1]
        wanted = torch.full_like(input_ids[:, :1], 5) if at % 8 == 0 else input_ids[:, [at % 6]]
        return scores + 1e3 * torch.zeros_like(scores).scatter_(1, wanted, 1.0)  # type: ignore[return-value]


@needs_kernels
def test_a_sequence_alone_is_guessed_ahead_and_one_beside_others_is_not(guesser: Variant, alone: Variant) -> None:
    counts, served, ids = engine_of(guesser).counts, serving(guesser), prompt(20)
    assert guesser.speculation is not None
    options: dict[str, Any] = {"logits_processor": [Round()]}
    expected = answer(serving(alone), ids, 60, **options)
    before = counts.copy()
    assert answer(served, ids, 60, **options) == expected
    tally, steps = guesser.speculation.tally, counts["steps"] - before["steps"]
    assert tally.right > 30
    assert tally.right + tally.steps + steps >= 59, "every token but the first has a step or is a right guess"
    assert steps < 20
    going, several = threading.Barrier(3), [prompt(20, seed) for seed in range(3)]

    def together(ids: list[int]) -> list[int]:
        going.wait(60)
        return answer(served, ids, 40, **options)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(together, several)) == [answer(serving(alone), ids, 40, **options) for ids in several]


@needs_kernels
def test_guesses_follow_from_the_sequence_also_after_a_rest(guesser: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, guess = list[list[int]](), PromptLookup.guess

    def noted(self: PromptLookup, most: int) -> list[int]:
        seen.append(list(self.tokens))
        return guess(self, most) or [3]  # mostly wrong, so that guessing rests again and again

    monkeypatch.setattr(PromptLookup, "guess", noted)
    whole = answer(serving(guesser), prompt(20), 60)
    assert 3 < len(seen) < 40
    assert all(tokens == whole[: len(tokens)] for tokens in seen)
    assert len(seen[-1]) > 30


@needs_kernels
def test_a_guessing_sequence_that_others_join_goes_on(guesser: Variant, alone: Variant) -> None:
    """Its wrong guesses leave no trace in the row, for itself or for the next sequence."""
    served, options = serving(guesser), {"logits_processor": [Round()]}
    work = [(prompt(20), 70), (prompt(11, 1), 9), (prompt(33, 2), 5), (prompt(6, 3), 30)]
    expected = [answer(serving(alone), *item, **options) for item in work]
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(answer, served, *work[0], **options)
            rest = []
            for item in work[1:]:
                time.sleep(0.01)
                rest.append(pool.submit(answer, served, *item, **options))
            assert [each.result() for each in (first, *rest)] == expected


@needs_kernels
def test_callers_get_their_own_answers(variant: Variant, alone: Variant) -> None:
    work = [(prompt(length, seed), tokens) for seed, (length, tokens) in enumerate(SHAPES)]
    expected = [answer(serving(alone), ids, tokens) for ids, tokens in work]
    served, engine = serving(variant), engine_of(variant)
    counts, before = engine.counts, engine.counts.copy()
    with ThreadPoolExecutor(len(work)) as pool:
        with engine.alone():  # until all have come
            asked = [pool.submit(answer, served, *item) for item in work]
            until_waiting(engine, len(work))
        assert [each.result() for each in asked] == expected
    steps = counts["steps"] - before["steps"]
    assert counts["requests"] - before["requests"] == len(work)
    assert steps < sum(tokens - 1 for _, tokens in work) / 2, "hardly anything was decoded together"


SHAPES = [(5, 9), (40, 30), (1, 20), (23, 25), (64, 12), (7, 40), (33, 15), (12, 33), (50, 20), (3, 28)]


@needs_kernels
def test_tokens_come_in_the_callers_thread(variant: Variant, alone: Variant) -> None:
    streamer = Streamer()
    got = answer(serving(variant), prompt(9), 12, streamer=streamer)
    assert got == answer(serving(alone), prompt(9), 12)
    assert streamer.tokens == got
    assert streamer.threads == {threading.get_ident()}
    assert streamer.ended


@needs_kernels
def test_tokens_of_a_step_are_handed_on_together_after_it(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows' tokens are all taken before any caller wakes, and all callers have theirs before the next computation."""
    engine, log = engine_of(variant), list[str]()
    take, hand_on, logits, advance = Request.take, Request.hand_on, engine.sequences.logits, engine._advance
    monkeypatch.setattr(Request, "take", lambda self, token: (log.append("take"), take(self, token))[1])
    monkeypatch.setattr(Request, "hand_on", lambda self: (log.append("hand on"), hand_on(self))[1])
    monkeypatch.setattr(engine.sequences, "logits", lambda: (log.append("compute"), logits())[1])
    monkeypatch.setattr(engine, "_advance", lambda prompt: (log.append("compute"), advance(prompt))[1])
    with ThreadPoolExecutor(ROWS) as pool:
        with engine.alone():
            asked = [
                pool.submit(answer, serving(variant), prompt(9, n), 6 + n, streamer=Streamer()) for n in range(ROWS)
            ]
            until_waiting(engine, ROWS)
        assert [len(each.result()) for each in asked] == [15 + n for n in range(ROWS)]
    turns = [" ".join(turn.split()) for turn in " ".join(log).split("compute")]
    kept = {" ".join(["take"] * n + ["hand on"] * n) for n in range(1, ROWS + 1)}
    assert set(turns[1:]) <= kept, turns
    assert " ".join(["take"] * ROWS + ["hand on"] * ROWS) in turns


@needs_kernels
def test_a_caller_that_streams_nothing_wakes_once(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    made, init = list[Any](), Request.__init__

    def noted(self: Request, call: Any) -> None:
        init(self, call)
        self._events = mock.Mock(wraps=self._events)
        made.append(self)

    monkeypatch.setattr(Request, "__init__", noted)
    answer(serving(variant), prompt(9), 12)
    answer(serving(variant), prompt(9), 12, streamer=Streamer())
    assert [[type(call.args[0]) for call in each._events.put.call_args_list] for each in made] == [
        [type(None)],
        [int] * 12 + [type(None)],
    ]


@needs_kernels
def test_a_caller_that_goes_frees_its_row(variant: Variant, alone: Variant) -> None:
    with pytest.raises(ConnectionError):
        answer(serving(variant), prompt(9), 80, streamer=Streamer(most=15))
    assert answer(serving(variant), prompt(6), 20) == answer(serving(alone), prompt(6), 20)
    assert engine_of(variant).sequences.rows == [None] * ROWS


def broken_after(calls: int) -> LogitsProcessorList:
    seen = []

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        if len(seen) > calls:
            raise ZeroDivisionError("the caller's own")
        return scores

    return LogitsProcessorList([processor])


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": broken_after(4)},
        {"stopping_criteria": StoppingCriteriaList([lambda ids, scores: 1 / 0])},
    ],
    ids=["processor", "criterion"],
)
def test_a_caller_with_a_fault_hurts_itself_alone(variant: Variant, alone: Variant, options: dict[str, Any]) -> None:
    require_others_unhurt(variant, alone, options, ZeroDivisionError)


@needs_kernels
@pytest.mark.parametrize("most", [5, 9, 34], ids=["first token", "a token", "last token"])
def test_a_streamer_that_raises_in_the_engines_thread_hurts_its_caller_alone(
    variant: Variant, alone: Variant, most: int
) -> None:
    streamer = Streamer(most)
    streamer.never_waits = True
    require_others_unhurt(variant, alone, {"streamer": streamer}, ConnectionError)
    assert len(streamer.threads) == 2, "the engine handed its tokens to its own thread"
    assert engine_of(variant).sequences.rows == [None] * ROWS


def require_others_unhurt(variant: Variant, alone: Variant, options: dict[str, Any], error: type[Exception]) -> None:
    """A caller with these options fails with the error, and those beside it get their answers."""
    served = serving(variant)
    with ThreadPoolExecutor(3) as pool:
        good = [pool.submit(answer, served, prompt(8, seed), 30) for seed in range(2)]
        bad = pool.submit(answer, served, prompt(5), 30, **options)
        with pytest.raises(error):
            bad.result()
        assert [g.result() for g in good] == [answer(serving(alone), prompt(8, seed), 30) for seed in range(2)]


@needs_kernels
def test_sampling_uses_the_callers_settings(variant: Variant, alone: Variant) -> None:
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20}
    torch.manual_seed(7)
    expected = answer(serving(alone), prompt(10), 16, **options)
    torch.manual_seed(7)
    assert answer(serving(variant), prompt(10), 16, **options) == expected


@pytest.mark.parametrize(
    ("sampled", "among_others"),
    [([True, False, None], [False]), ([True, None, True, False], [True, True]), ([False], [])],
)
def test_one_sequence_is_drawn_as_transformers_draws_it(sampled: list[bool | None], among_others: list[bool]) -> None:
    """Several take turns with the process's random numbers, whoever draws them, and are drawn faster."""
    told = list[bool]()

    def choose(logits: torch.Tensor, *, among_others: bool) -> int:
        told.append(among_others)
        return 2

    requests: list[Any] = [
        None if draws is None else types.SimpleNamespace(is_drawn=draws, is_greedy=not draws, tokens=1, choose=choose)
        for draws in sampled
    ]
    logits = torch.eye(len(sampled), 5)
    found = HostTokens(len(sampled)).choose(requests, logits)
    assert found == [None if draws is None else 2 if draws else row for row, draws in enumerate(sampled)]
    assert told == among_others


def test_who_only_processes_scores_does_not_draw() -> None:
    told = list[bool]()

    def choose(logits: torch.Tensor, *, among_others: bool) -> int:
        told.append(among_others)
        return 2

    requests: list[Any] = [
        types.SimpleNamespace(is_drawn=draws, is_greedy=False, tokens=1, choose=choose) for draws in (True, False)
    ]
    assert HostTokens(2).choose(requests, torch.eye(2, 5)) == [2, 2]
    assert told == [False, False]


@needs_kernels
def test_a_batch_of_the_callers_runs_between_steps(variant: Variant, alone: Variant) -> None:
    ids = torch.tensor([prompt(6, seed) for seed in range(ROWS)])  # a batch as large as the engine's
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": PAD}
    expected = serving(alone).generate(ids, attention_mask=torch.ones_like(ids), **options)
    served = serving(variant)
    with ThreadPoolExecutor(4) as pool:
        single = [pool.submit(answer, served, prompt(9, seed), 40) for seed in range(3)]
        got = pool.submit(lambda: served.generate(ids, attention_mask=torch.ones_like(ids), **options)).result()
        assert [s.result() for s in single] == [answer(serving(alone), prompt(9, seed), 40) for seed in range(3)]
    assert torch.equal(got, expected)


@needs_kernels
def test_positions_of_the_callers_own_are_its_alone(variant: Variant, alone: Variant) -> None:
    """What was read at other positions is not kept for a prompt of the same tokens."""
    ids, shifted = prompt(12, seed=4), torch.arange(12)[None] + 40
    expected = [answer(serving(alone), ids, 16, **options) for options in ({"position_ids": shifted}, {})]
    assert expected[0] != expected[1]
    served = serving(variant)
    assert [answer(served, ids, 16, **options) for options in ({"position_ids": shifted}, {})] == expected


@needs_kernels
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the engine's thread ends by it
@pytest.mark.parametrize("at", ["criterion", "fill", "keep_last"])
def test_whatever_escapes_around_a_first_token_its_caller_is_told(
    variant: Variant, alone: Variant, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request is in neither the queue nor a row then."""

    def leave(*_: Any, **__: Any) -> None:
        raise SystemExit("mine")

    told: list[str] = []

    def ask() -> None:
        try:
            answer(serving(variant), prompt(9), 8, **({"stopping_criteria": [leave]} if at == "criterion" else {}))
        except VariantError as error:
            told.append(str(error))

    with monkeypatch.context() as broken:
        if at != "criterion":
            broken.setattr(Prefixes, at, leave)
        caller = threading.Thread(target=ask, daemon=True)
        caller.start()
        caller.join(60)
    assert (caller.is_alive(), told) == (False, ["SystemExit: mine"])
    assert answer(serving(variant), prompt(9), 8) == answer(serving(alone), prompt(9), 8)


@needs_kernels
@pytest.mark.parametrize("at", ["_copied", "fill"])
def test_memory_that_runs_out_for_what_is_kept_of_prompts_harms_nobody_else(
    variant: Variant, alone: Variant, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, fill = engine_of(variant), Prefixes.fill

    def no_room(*given: Any) -> Any:
        if at == "fill" and given[2][0] != 9:
            return fill(*given)
        raise MemoryError("can't allocate memory")

    def ask(first: int, tokens: int) -> Any:
        try:
            return answer(serving(variant), [first, *prompt(8)], tokens)
        except VariantError as error:
            return str(error)

    with monkeypatch.context() as full:
        full.setattr(Prefixes if at == "fill" else prefixes, at, no_room)
        with ThreadPoolExecutor(2) as pool:
            with engine.alone():
                asked = [pool.submit(ask, 3, 40), pool.submit(ask, 9, 5)]
                until_waiting(engine, 2)
            long, short = (each.result(60) for each in asked)
    expected = [answer(serving(alone), [first, *prompt(8)], tokens) for first, tokens in ((3, 40), (9, 5))]
    assert long == expected[0]
    assert short == ("MemoryError: can't allocate memory" if at == "fill" else expected[1])
    assert ask(9, 5) == expected[1]


@needs_kernels
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the engine's thread ends by it
def test_an_evicted_sequence_that_cannot_have_its_row_back_is_told(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, told = engine_of(variant), list[str]()
    resume, evict = engine.sequences.resume_before, engine.sequences.evict_for
    urgent = threading.Thread(target=lambda: ask(50, 4, 3600), daemon=True)

    def ask(first: int, tokens: int, priority: int) -> None:
        CURRENT.set(RequestTerms(priority))
        try:
            answer(serving(variant), [first, *prompt(4)], tokens)
        except VariantError as error:
            told.append(str(error))

    def evict_for(order: float) -> None:
        if not engine.sequences.free and not urgent.ident:
            urgent.start()
            until_waiting(engine, 1)
            order = engine._first_waiting()
        evict(order)

    def resume_before(order: float) -> None:
        with monkeypatch.context() as full:
            full.setattr(RowCache, "join", no_room)
            resume(order)

    def no_room(*_: Any) -> None:
        raise MemoryError("can't allocate memory")

    monkeypatch.setattr(engine.sequences, "evict_for", evict_for)
    monkeypatch.setattr(engine.sequences, "resume_before", resume_before)
    callers = [threading.Thread(target=ask, args=(row, 60, 0), daemon=True) for row in range(3, 3 + ROWS)]
    with engine.alone():
        for caller in callers:
            caller.start()
        until_waiting(engine, ROWS)
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers), "one waits for ever"
    for thread in threading.enumerate():
        if thread.name == "autotune-engine":  # which ends by it
            thread.join(60)
    assert set(told) == {"MemoryError: can't allocate memory"}


@needs_kernels
def test_a_step_that_fails_fails_its_sequences_and_no_later_one(
    variant: Variant, alone: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(variant)
    logits, calls = engine.sequences.logits, []

    def failing() -> torch.Tensor:
        calls.append(0)
        if len(calls) == 5:
            raise RuntimeError("no such kernel")
        return logits()

    monkeypatch.setattr(engine.sequences, "logits", failing)
    with pytest.raises(VariantError, match="no such kernel"):
        answer(serving(variant), prompt(5), 30)
    assert answer(serving(variant), prompt(5), 30) == answer(serving(alone), prompt(5), 30)


@needs_kernels
def test_rows_with_nan_fail_alone(variant: Variant, alone: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    require_nan_hurts_alone(variant, alone, monkeypatch)


def require_nan_hurts_alone(variant: Variant, alone: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence whose logits are NaN fails, and one beside it gets its answer."""
    sequences = engine_of(variant).sequences
    logits = sequences.logits

    def spoilt() -> torch.Tensor:
        found = logits()
        for row, request in enumerate(sequences.rows[: len(found)]):
            if request is not None and request.ids[0, 0] == 3:
                found[row] = torch.nan
        return found

    monkeypatch.setattr(sequences, "logits", spoilt)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(answer, serving(variant), [4, *prompt(7)], 25)
        with pytest.raises(VariantError, match="NaN logits"):
            answer(serving(variant), [3, *prompt(5)], 25)
        assert good.result() == answer(serving(alone), [4, *prompt(7)], 25)


Arrival = tuple[int, int, int, int, int | None]  # tokens of the prompt, new ones, pause before it, priority, seed
ARRIVAL = st.tuples(
    st.integers(1, 70),
    st.integers(1, 25),
    st.integers(0, 3),
    st.sampled_from([0, 0, 0, 5, 3600]),
    st.sampled_from([None, None, 1, 2]),
)


@needs_kernels
@settings(max_examples=20, deadline=None)
@given(st.lists(ARRIVAL, min_size=2, max_size=14))
def test_whenever_requests_come_each_gets_the_answer_it_would_get_alone(
    variant: Variant, alone: Variant, arrivals: list[Arrival]
) -> None:
    """More requests than rows, long and short, greedy and sampled by a seed, patient and urgent."""
    require_own_answers(variant, alone, arrivals)


def require_own_answers(variant: Variant, alone: Variant, arrivals: list[Arrival]) -> None:
    """Each request gets the answer that it would get alone, and nothing is left of it."""

    def ask(served: Any, length: int, tokens: int, priority: int, seed: int | None) -> list[int]:
        CURRENT.set(RequestTerms(priority))
        options = (
            {} if seed is None else {"do_sample": True, "logits_processor": LogitsProcessorList([ByPosition(seed)])}
        )
        return answer(served, prompt(length, length), tokens, **options)

    with ThreadPoolExecutor(len(arrivals)) as pool:
        asked = []
        for length, tokens, pause, priority, seed in arrivals:
            time.sleep(0.001 * pause)
            asked.append(pool.submit(ask, serving(variant), length, tokens, priority, seed))
        got = [each.result() for each in asked]
    assert got == [ask(serving(alone), length, tokens, 0, seed) for length, tokens, _, _, seed in arrivals]
    assert not engine_of(variant)._is_busy()


class ByPosition(LogitsProcessor):
    """Draws a token by a seed and the position alone, as a submitted request with a seed does."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        source = torch.Generator().manual_seed(1000 * self.seed + input_ids.shape[1])
        token = torch.multinomial(scores.softmax(-1), 1, generator=source)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


@needs_kernels
def test_urgent_requests_take_rows_that_others_get_back(
    variant: Variant, alone: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are full when two urgent requests come. They end first, and nobody's answer changes."""
    engine = engine_of(variant)
    logits, ended, counts = engine.sequences.logits, list[str](), engine.counts.copy()
    work = {f"patient {seed}": (prompt(9 + seed, seed), 40) for seed in range(ROWS)}
    urgent = {f"urgent {seed}": (prompt(33 + seed, seed), 12) for seed in range(2)}

    def ask(name: str, ids: list[int], tokens: int, priority: int) -> list[int]:
        CURRENT.set(RequestTerms(priority))
        found = answer(serving(variant), ids, tokens)
        ended.append(name)
        return found

    with ThreadPoolExecutor(8) as pool:

        def when_full() -> torch.Tensor:
            if None not in engine.sequences.rows and not later:
                later.extend(pool.submit(ask, name, *asked, 3600) for name, asked in urgent.items())
                until_waiting(engine, len(urgent))
            return logits()

        later = list[Future[list[int]]]()
        monkeypatch.setattr(engine.sequences, "logits", when_full)
        with engine.alone():
            asked = [pool.submit(ask, name, *each, 0) for name, each in work.items()]
            until_waiting(engine, len(work))
        got = [each.result() for each in asked] + [each.result() for each in later]
    assert got == [answer(serving(alone), *each) for each in (work | urgent).values()]
    assert set(ended[: len(urgent)]) == set(urgent)
    assert engine.counts["evicted"] - counts["evicted"] == len(urgent)
    assert "sequences made room for more urgent ones" in engine.summary()
    assert not engine._is_busy()


@needs_kernels
def test_the_queue_is_bounded(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(variant)
    monkeypatch.setattr(engine, "most_waiting", 0)
    with pytest.raises(QueueFullError, match="0 requests wait for one of 4 rows"):
        answer(serving(variant), prompt(5), 5)


@needs_kernels
@pytest.mark.parametrize("length", [7, 8, 9, 30])
def test_a_prompt_in_parts_gives_the_same(
    variant: Variant, alone: Variant, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_of(variant), "prefixes", Prefixes(8))
    assert answer(serving(variant), prompt(length), 12) == answer(serving(alone), prompt(length), 12)


@needs_kernels
def test_between_two_parts_of_a_prompt_every_running_sequence_gets_a_token(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, log = engine_of(variant), list[str]()
    logits, advance = engine.sequences.logits, engine._advance
    monkeypatch.setattr(engine, "joins", False)
    monkeypatch.setattr(engine, "prefixes", Prefixes(8))
    monkeypatch.setattr(engine.sequences, "logits", lambda: (log.append("step"), logits())[1])
    monkeypatch.setattr(engine, "_advance", lambda prompt: (log.append("part"), advance(prompt))[1])
    with ThreadPoolExecutor(3) as pool:
        with engine.alone():
            asked = [pool.submit(answer, serving(variant), prompt(5, n), 30) for n in range(2)]
            until_waiting(engine, 2)
            asked.append(pool.submit(answer, serving(variant), prompt(60), 5))  # eight parts
            until_waiting(engine, 3)
        for each in asked:
            each.result()
    assert log[:20] == ["part", "step"] * 10


@needs_kernels
def test_what_prompts_begin_with_alike_is_computed_once(
    variant: Variant, alone: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(variant)
    system = prompt(27, seed=9)  # three parts of eight tokens, and three tokens more
    prompts = [[*system, *prompt(length, seed=length)] for length in (1, 4, 5, 13, 30)]
    cold = []
    for ids in prompts:
        monkeypatch.setattr(engine, "prefixes", Prefixes(8))
        cold.append(answer(serving(variant), ids, 12))
        assert engine.prefixes.tokens_found == 0
    assert cold == [answer(serving(alone), ids, 12) for ids in prompts]
    monkeypatch.setattr(engine, "prefixes", Prefixes(8))
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(lambda ids: answer(serving(variant), ids, 12), prompts)) == cold
    assert engine.prefixes.tokens_found == 24 * (len(prompts) - 1)
    assert f"{24 * (len(prompts) - 1)} tokens of prompts were known" in engine.summary()


@needs_kernels
def test_an_engine_that_is_told_to_forget_computes_every_prompt(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, found = engine_of(variant), list[int]()
    monkeypatch.setattr(engine, "prefixes", Prefixes(8))
    for remembers in (False, True):
        engine.remember(remembers)
        for ids in (prompt(30), prompt(30), [*prompt(30)[:20], 5]):
            answer(serving(variant), ids, 2)
        found.append(engine.prefixes.tokens_found)
    assert found == [0, 30 + 16]


def request_of(variant: Variant, ids: Sequence[int]) -> Any:
    """The parts of a request that reading its prompt needs."""
    given = torch.tensor([list(ids)])
    call = seam.Sampling(variant.original, given, {}, {"attention_mask": torch.ones_like(given)})
    return types.SimpleNamespace(prompt=tuple(ids), call=call)


@needs_kernels
def test_found_parts_are_the_computed_ones_to_the_bit(variant: Variant) -> None:
    prefixes, ids = Prefixes(8), prompt(30)
    request = request_of(variant, ids)

    def computed() -> tuple[int, Any, torch.Tensor]:
        reading = Prefill(request, prefixes)
        found, read = reading.done, None
        with torch.no_grad():
            while read is None:
                read = reading.advance(variant, 8)
        return found, read[0].cache, read[0].logits

    (cold, first, logits), *others = computed(), computed()
    prefixes.keep_last(first, tuple(ids), logits)
    others.append(computed())
    assert [cold, *(found for found, _, _ in others)] == [0, 24, 30]
    for _, cache, again in others:
        assert torch.equal(logits, again)
        for one, other in zip(seam.keys_and_values(first), seam.keys_and_values(cache), strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])


def spied(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens of forwards over prompts from now on."""
    computed, running = list[int](), variant.running

    @contextmanager
    def spying(phase: Any) -> Iterator[Any]:
        with running(phase) as module:

            def forward(**given: Any) -> Any:
                computed.append(given["input_ids"].shape[1])
                return module(**given)

            yield forward if phase == "prefill" else module

    monkeypatch.setattr(variant, "running", spying)
    return computed


@needs_kernels
@pytest.mark.parametrize("joins", [True, False], ids=["joined", "one by one"])
@pytest.mark.parametrize("length", [3, 7, 8, 9, 16, 30])
def test_a_prompt_of_several_answers_is_computed_once(
    variant: Variant, alone: Variant, length: int, joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ids = engine_of(variant), prompt(length, seed=3)
    monkeypatch.setattr(engine, "joins", joins)
    monkeypatch.setattr(engine, "merges", False)
    monkeypatch.setattr(joined, "SHORTEST", 3)
    monkeypatch.setattr(engine, "prefixes", Prefixes(8))
    drawn = ({"do_sample": True, "logits_processor": LogitsProcessorList([ByPosition(n)])} for n in range(3))
    options: list[dict[str, Any]] = [{}, *drawn]
    expected = [answer(serving(alone), ids, 12, **each) for each in options]
    before, computed = engine.counts.copy(), spied(variant, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        with engine.alone():
            asked = [pool.submit(answer, serving(variant), ids, 12, **each) for each in options]
            until_waiting(engine, 4)
        assert [each.result() for each in asked] == expected
    assert len({tuple(each) for each in expected}) == 4
    assert sum(computed) == length
    assert engine.counts["prefills"] - before["prefills"] == len(computed) == -(-length // 8)
    assert engine.counts["requests"] - before["requests"] == 4


@needs_kernels
def test_prompts_that_are_known_come_between_two_steps_by_the_rows(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ids = engine_of(variant), prompt(20, seed=8)
    expected, taken, admit = answer(serving(variant), ids, 1), list[int](), engine._admit
    before = engine.counts["requests"]

    def admitting() -> None:
        taken.append(engine.counts["requests"] - before)
        admit()

    monkeypatch.setattr(engine, "_admit", admitting)
    with ThreadPoolExecutor(10) as pool:
        with engine.alone():
            asked = [pool.submit(answer, serving(variant), ids, 1) for _ in range(10)]
            until_waiting(engine, 10)
        assert [each.result() for each in asked] == [expected] * 10
    assert taken == [0, ROWS, 2 * ROWS]


# Several parts of a prompt in one forward


@pytest.mark.parametrize(
    ("begin", "tokens", "most", "end"),
    [
        (0, 100, 128, 100),
        (0, 128, 512, 128),
        (0, 159, 128, 159),  # a last part of 31 tokens is computed with the one before
        (0, 160, 128, 128),
        (0, 300, 128, 128),
        (128, 287, 128, 287),
        (128, 288, 128, 256),
        (256, 300, 128, 300),
        (0, 300, 512, 300),
        (128, 300, 512, 300),  # the beginning was known
        (0, 520, 512, 520),
        (0, 544, 512, 512),
        (0, 2000, 512, 512),
        (1536, 2000, 512, 2000),
    ],
)
def test_where_a_forward_over_a_prompt_ends(begin: int, tokens: int, most: int, end: int) -> None:
    assert Prefixes(128, 32).end_of(begin, tokens, most) == end


@pytest.mark.parametrize(
    ("tokens", "least", "side", "found"),
    [
        (129, 1, 0, 128),
        (129, 2, 0, 0),
        (160, 32, 0, 128),
        (159, 32, 0, 0),
        (287, 32, 0, 128),
        (288, 32, 0, 256),
        (31, 32, 0, 0),
        (159, 32, 16, 112),
        (160, 32, 16, 128),
        (287, 32, 16, 240),
        (288, 32, 16, 256),
        (31, 32, 16, 0),
        (47, 32, 16, 0),
        (128, 32, 16, 96),
    ],
)
def test_how_much_of_a_prompt_may_be_found(tokens: int, least: int, side: int, found: int) -> None:
    prefixes, ids, cache = Prefixes(128, least, side), tuple(prompt(600, seed=5)), seam.growing_cache()
    numbers = torch.arange(600.0)[None, None, :, None]
    cache.update(numbers, -numbers, 0)
    prefixes.keep(cache, ids, 0, 600)
    filled = seam.growing_cache()
    assert prefixes.fill(filled, ids[:tokens]) == (found, None)
    for keys, values in seam.keys_and_values(filled) if found else ():
        assert torch.equal(keys, numbers[:, :, :found])
        assert torch.equal(values, -keys)
    prefixes.keep_last(cache, ids[:tokens], torch.ones(1, 3))
    again = seam.growing_cache()
    assert prefixes.fill(again, ids[:tokens])[0] == tokens


@needs_kernels
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "mistral-window", "gpt2", "mixtral"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_parts_are_computed_in_one_forward_only_if_the_prompt_gets_the_same_numbers(
    arch: str, bits: int | None
) -> None:
    """To the bit, and whatever the engine computes at once from one turn to the next."""
    kernel = (WeightOnly("decode", bits=bits), PackedPrefill("prefill"), PrefillAttention("prefill")) if bits else ()
    variant, part = Variant(tiny(arch)).with_transforms(kernel), 64
    if not (joined.is_exact(variant, part) and prefill.parts_agree(variant, part)):
        assert arch != "llama" or not bits, "the usual plan"
        return
    for length in (65, 95, 96, 128, 159, 161, 200, 250):
        request, found = request_of(variant, prompt(length, seed=7)), []
        for most in ((part,), (4 * part,), (2 * part, part, 4 * part)):
            reading, read = Prefill(request, Prefixes(part, joined.SHORTEST, joined.SIDE)), None
            turns = iter([*most, *most, *most, *most])
            with torch.no_grad():
                while read is None:
                    read = reading.advance(variant, next(turns))
            found.append((read[0].logits, read[0].cache))
            kept = reading.prefixes
        again = Prefill(request, kept)
        assert again.done >= length - 2 * joined.SHORTEST
        with torch.no_grad():
            (rest,) = again.advance(variant, part) or ()
        found.append((rest.logits, rest.cache))
        assert joined.is_same(found[0], found[3]), f"{length}, found up to {again.done}"
        assert joined.is_same(found[0], found[1]), length
        assert joined.is_same(found[0], found[2]), length


@needs_kernels
@pytest.mark.parametrize("merges", [True, False])
def test_a_prompt_is_computed_in_one_forward_while_nobody_waits_for_a_step(
    variant: Variant, alone: Variant, merges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ids = engine_of(variant), prompt(30, seed=4)
    monkeypatch.setattr(engine, "merges", merges)
    expected, computed = answer(serving(alone), ids, 12), spied(variant, monkeypatch)
    monkeypatch.setattr(engine, "prefixes", Prefixes(8))
    assert answer(serving(variant), ids, 12) == expected
    assert computed == ([30] if merges else [8, 8, 8, 6])
    assert answer(serving(variant), [*ids[:24], 5], 1)[:24] == ids[:24]
    assert engine.prefixes.tokens_found == 24, "its parts are kept one by one"
    monkeypatch.setattr(engine, "prefixes", Prefixes(8))
    computed.clear()
    with ThreadPoolExecutor(2) as pool:
        with engine.alone():
            first = pool.submit(answer, serving(variant), prompt(7), 40)
            until_waiting(engine, 1)
            asked = pool.submit(answer, serving(variant), ids, 12)
            until_waiting(engine, 2)
        assert asked.result() == expected
        first.result()
    assert computed == [7, 8, 8, 8, 6], "a sequence under way waits for one part at most"


# Several short prompts in one forward


@pytest.mark.parametrize(
    ("lengths", "room", "together"),
    [
        ([64], 128, 1),
        ([64, 64], 128, 2),
        ([64, 64, 64], 128, 2),
        ([100, 40], 128, 1),
        ([64] * 9, 512, 8),
        ([128] * 4, 512, 4),
        ([159] * 4, 512, 3),
        ([200, 64], 512, 1),  # a long prompt goes part by part, alone
        ([64, 200, 64], 512, 1),  # and nobody overtakes it
        ([64, 31, 64], 512, 1),
        ([5, 64], 512, 1),
    ],
)
def test_short_prompts_that_wait_are_computed_together(lengths: list[int], room: int, together: int) -> None:
    assert joined.count(lengths, room, longest=159) == together


@pytest.mark.parametrize(
    ("waiting", "known", "chosen"),
    [
        ("ABC", "", "ABC"),
        ("AABB", "", "AB"),  # the others find what these compute
        ("ABAC", "B", "AC"),
        ("AB", "A", "A"),  # which takes no time
        ("ABC", "BC", "A"),
    ],
)
def test_only_prompts_that_nobody_computes_are_computed_together(waiting: str, known: str, chosen: str) -> None:
    order: list[Any] = [types.SimpleNamespace(prompt=(ord(name),) * 40) for name in waiting]
    found = joined.together(order, 512, 128, lambda prompt: chr(prompt[0]) in known)
    assert found == [order[waiting.index(name)] for name in chosen]


def read_alone(variant: Variant, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    request = request_of(variant, ids[0].tolist())
    (found,) = Prefill(request, Prefixes(128)).advance(variant, 128) or ()
    return found.logits, found.cache


@needs_kernels
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "mistral-window", "gpt2", "mixtral"])
@pytest.mark.parametrize("chain", [(), (PrefillAttention("prefill"),)], ids=["plain", "kernel"])
def test_prompts_are_computed_together_only_if_each_gets_its_own_numbers(arch: str, chain: tuple[Transform]) -> None:
    """A model with a window shorter than a prompt, or a kernel that sums in another order, computes them one by one."""
    variant = Variant(tiny(arch)).with_transforms(chain)
    if not joined.is_exact(variant, 64):
        return
    assert arch != "mistral-window"
    prompts = [torch.tensor([prompt(length, seed=7)]) for length in (32, 61, 47, 64, 33)]
    with torch.no_grad():
        together = joined.read(variant, [(ids, torch.arange(ids.shape[1])[None]) for ids in prompts])
        assert all(joined.is_same(one, read_alone(variant, ids)) for one, ids in zip(together, prompts, strict=True))


@needs_kernels
@pytest.mark.skipif(kernels.no_bf16_unit() is not None, reason=str(kernels.no_bf16_unit()))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_usual_plan_computes_prompts_together(precision: str) -> None:
    chain = (WeightOnly("decode"), LinearBf16("prefill", weights="decode"), FusedLayers("prefill"))
    variant = Variant(tiny("llama")).with_transforms((*chain, PrefillAttention("prefill", precision)))
    assert joined.is_exact(variant, 128)


@needs_kernels
def test_callers_who_come_at_once_share_a_forward(
    variant: Variant, alone: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(variant)
    monkeypatch.setattr(engine, "joins", True)  # whatever the numbers' last bits: tokens are compared
    before, prompts = engine.counts.copy(), [prompt(length, seed=5) for length in (40, 33, 64, 51)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        with engine.alone():
            asked = [pool.submit(answer, serving(variant), ids, 12) for ids in prompts]
            until_waiting(engine, len(prompts))
        got = [each.result() for each in asked]
    assert got == [answer(serving(alone), ids, 12) for ids in prompts]
    assert engine.counts["prefills"] - before["prefills"] == 1


@needs_kernels
def test_callers_of_a_burst_wait_for_one_another_and_one_alone_does_not(
    variant: Variant, alone: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(variant)
    monkeypatch.setattr(engine, "joins", True)
    monkeypatch.setattr(engine, "wait_s", 600.0)  # far more than the test may take
    monkeypatch.setattr(engine, "_at_once", 3)
    before, prompts = engine.counts.copy(), [prompt(length, seed=6) for length in (40, 33, 64)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = []
        for number, ids in enumerate(prompts, 1):
            assert engine.counts["prefills"] == before["prefills"]
            asked.append(pool.submit(answer, serving(variant), ids, 12))
            if number < len(prompts):
                until_waiting(engine, number)
        assert [each.result() for each in asked] == [answer(serving(alone), ids, 12) for ids in prompts]
    assert engine.counts["prefills"] - before["prefills"] == 1
    monkeypatch.setattr(engine, "_at_once", 1)
    for _ in range(2):
        assert answer(serving(variant), prompt(40), 12) == answer(serving(alone), prompt(40), 12)


@needs_kernels
def test_a_forward_that_fails_fails_its_prompts_and_no_later_one(
    variant: Variant, alone: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(variant)
    monkeypatch.setattr(engine, "joins", True)
    monkeypatch.setattr(engine, "prefixes", Prefixes(128))
    with ThreadPoolExecutor(2) as pool, monkeypatch.context() as broken:
        broken.setattr(joined, "read", lambda *given: 1 / 0)
        with engine.alone():
            asked = [pool.submit(answer, serving(variant), prompt(40, seed), 8) for seed in range(2)]
            until_waiting(engine, 2)
        for each in asked:
            with pytest.raises(VariantError, match="division by zero"):
                each.result()
    assert answer(serving(variant), prompt(40), 8) == answer(serving(alone), prompt(40), 8)


def test_prefixes_keep_to_their_bytes() -> None:
    one_part = 2 * 2 * 3 * 4 * 5 * 4  # layers x (keys, values) x heads x tokens x depth x bytes
    prefixes = Prefixes(4, most_bytes=3 * one_part, most_last_bytes=2 * (one_part + 40))
    for n in range(6):
        cache = seam.growing_cache()
        for layer in range(2):
            cache.update(torch.full((1, 3, 4, 5), float(n)), torch.full((1, 3, 4, 5), float(n)), layer)
        prefixes.keep(cache, (n,) * 9, 0, 4)
        prefixes.keep(cache, (n,) * 4, 0, 4)  # the last part
        prefixes.keep_last(cache, (n,) * 4, torch.full((1, 10), float(n)))
    assert prefixes._beginnings.nbytes == 3 * one_part
    assert prefixes._last.nbytes == 2 * (one_part + 40)
    assert [prefixes.fill(seam.growing_cache(), (n,) * 9) for n in range(6)] == [(k, None) for k in (0, 0, 0, 4, 4, 4)]
    assert prefixes.fill(seam.growing_cache(), (3,) * 4) == (0, None)  # as a beginning it is known, without logits
    found, cache = prefixes.fill(seam.growing_cache(), (4,) * 4), seam.growing_cache()
    assert (found[0], found[1] is not None and found[1].tolist()) == (4, [[4.0] * 10])
    prefixes.fill(cache, (5,) * 5)
    assert all(bool((held == 5).all()) for pair in seam.keys_and_values(cache) for held in pair)


@needs_kernels
def test_an_engine_keeps_no_unused_model_alive() -> None:
    made = Variant(tiny("llama")).with_transforms((*STEP, ContinuousBatching("decode", rows=2)))
    answer(serving(made), prompt(5), 8)
    gone = weakref.ref(made)
    worker = engine_of(made)._worker  # it delivers the answer before it ends
    del made
    if worker is not None:
        worker.join(20)
    del worker
    gc.collect()
    assert gone() is None


@needs_kernels
def test_a_thread_serves_requests_one_after_the_other_until_none_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Variant(tiny("llama")).with_transforms((*STEP, ContinuousBatching("decode", rows=2)))
    engine, expected = engine_of(made), answer(serving(made), prompt(9), 4)
    if (first := engine._worker) is not None:
        first.join(20)
    monkeypatch.setattr("autotune.runtime.batching.engine.LINGER_S", 60.0)
    workers = []
    for _ in range(2):
        assert answer(serving(made), prompt(9), 4) == expected
        workers.append(engine._worker)
    assert workers[0] is workers[1] is not first
    assert workers[0] is not None
    engine._stop()
    workers[0].join(20)
    assert not workers[0].is_alive()
    assert engine._worker is None


@needs_kernels
def test_steps_are_recorded_anew_once_weights_have_moved(alone: Variant) -> None:
    model = tiny("llama")
    made = Variant(model).with_transforms((*STEP, ContinuousBatching("decode", rows=2)))
    assert isinstance(made.step, StepPrograms)
    expected = answer(serving(alone), prompt(9), 8)
    assert answer(serving(made), prompt(9), 8) == expected
    old = made.step.programs
    Original(model).release(made)
    with mock.patch.object(Program, "run", autospec=True, side_effect=Program.run) as run:
        assert answer(serving(made), prompt(9), 8) == expected
    ran = [call.args[0] for call in run.call_args_list]
    assert ran
    assert not [program for program in ran if any(program is other for other in old)], "it ran over the old addresses"


def test_without_a_recorded_step_it_says_why() -> None:
    with pytest.raises(TransformError, match="needs a recorded decode step"):
        Variant(tiny("llama")).with_transform(ContinuousBatching("decode"))
