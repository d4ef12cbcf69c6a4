"""Whether callers are decoded together: the decision as a table, and measurements of real tiny models."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from autotune.machine import device
from autotune.machine.hardware import Hardware
from autotune.runtime import kernels
from autotune.runtime.batching.engine import Engine
from autotune.runtime.batching.load import EngineLoad
from autotune.runtime.batching.rows import sizes
from autotune.runtime.traffic import Traffic
from autotune.runtime.variant import Variant
from autotune.transforms.continuous_batching import ContinuousBatching, bytes_per_row
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.static_cache import StaticCache
from autotune.transforms.step_program import StepProgram
from autotune.tune import callers, policy, ties
from autotune.tune.sharing import LOOKS, CallersPoint, Sharing, decide, is_clear, step_times
from autotune.validate import quality
from autotune.workload import Workload
from tests.fakes.cuda import FakeCuda
from tests.models import PAD, tiny, token_prompts
from tests.surroundings import without_threads

needs_kernels = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
CPU = Hardware("cpu", "a CPU", "AVX2", 1, 8 * 10**9, 20e9, {"float32": 1e11}, "g++", {})
PLANS = {"cpu": StepProgram("decode", slots=128), "cuda": StaticCache("decode", slots=128)}
WORK = Workload(tuple(map(tuple, token_prompts(5))), new_tokens=12)


@pytest.mark.parametrize(("most", "numbers"), [(2, (1, 2)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (16, (1, 2, 4, 8, 16))])
def test_numbers_of_callers(most: int, numbers: tuple[int, ...]) -> None:
    assert sizes(most) == numbers


def measured(*points: tuple[int, tuple[float, ...]], differing: int = 0) -> Sharing:
    """Rates where one caller at a time gets 100, 100 and 50 tokens per second in three rounds."""
    alone = (100.0, 100.0, 50.0)
    ratios = [tuple(rate / without for rate, without in zip(rates, alone, strict=True)) for _, rates in points]
    return Sharing(
        "",
        alone_tokens_per_s=alone,
        points=tuple(
            CallersPoint(callers, rates, found, (0.1,), (0.01 * callers,))
            for (callers, rates), found in zip(points, ratios, strict=True)
        ),
        differing=differing,
    )


EVEN, TWICE, HALF_MORE = (100, 100, 50), (200, 200, 100), (150, 150, 75)


@pytest.mark.parametrize(
    ("found", "most_tpot_s", "rows", "said"),
    [
        (measured((1, EVEN), (4, TWICE)), math.inf, 4, r"4 callers get 2.00x \(2.00 to 2.00\)"),
        (measured((1, (98, 99, 48)), (4, (180, 200, 105))), math.inf, 4, "and a single caller 0.98x"),
        (measured((1, (99, 99, 49)), (2, HALF_MORE), (4, (140, 150, 70))), math.inf, 4, "2 callers get 1.50x"),
        (measured((1, (96, 96, 48)), (4, TWICE)), math.inf, 0, "a single caller would get 0.96x"),
        (measured((1, EVEN), (4, (105, 109, 54))), math.inf, 0, "4 callers get 1.08x"),
        (measured((1, EVEN), (4, (200, 200, 49))), math.inf, 0, r"2.00x \(0.98 to 2.00\)"),
        (measured((1, EVEN), (4, TWICE), differing=2), math.inf, 0, "2 answers were not those"),
        (measured((1, EVEN), (2, HALF_MORE), (4, TWICE)), 0.04, 4, "4 callers get 2.00x"),
        (
            measured((1, EVEN), (2, HALF_MORE), (4, TWICE)),
            0.03,
            2,
            "2 callers get 1.50x .*; 4 would get a token every 40 ms each, over max_tpot_ms of the policy, 30",
        ),
        (
            measured((1, EVEN), (2, HALF_MORE)),
            0.01,
            0,
            "2 callers would get a token every 20 ms each, over max_tpot_ms",
        ),
    ],
)
def test_the_decision(found: Sharing, most_tpot_s: float, rows: int, said: str) -> None:
    import re

    decision, reason = decide(found, most_tpot_s)
    assert decision == rows
    assert re.search(said, reason), reason


@dataclass
class Bench:
    """What is measured needs; nothing waits for live requests of others."""

    original: Variant
    policy: Any
    hardware: Hardware = CPU
    workload: Workload = WORK
    deadline: float = math.inf
    pad: int = PAD
    tie_nats: float = 0.05
    free: float = 1e12
    said: list[str] = field(default_factory=list)

    def notify(self, step: str) -> None:
        self.said.append(step)

    def free_bytes(self) -> float:
        return self.free


def bench(**changes: Any) -> Bench:
    asked = policy.Batching(**{"max_batch": 4} | changes.pop("batching", {}))
    tuned = replace(policy.load("balanced"), batching=asked)
    return Bench(Variant(tiny("llama"), Traffic(), WORK), tuned, **changes)


def on_a_gpu() -> Any:
    return device.stand_in(FakeCuda())


def recorded(made: Bench) -> Variant:
    return made.original.with_transform(StepProgram("decode", slots=128))


def test_a_policy_that_does_not_ask_measures_nothing() -> None:
    made = bench(batching={"max_batch": 1})
    assert callers.measure(made.original, made) == (made.original, None)
    assert made.said == []


@pytest.mark.parametrize(
    ("changes", "plan", "said"),
    [
        ({}, [LeanLoop()], "needs a recorded decode step"),
        ({"free": 1000.0}, None, r"it takes 0.000\d+ GB beside what serves now, and \S+ GB of memory are free"),
        (
            {"batching": {"max_kv_mb": 0.1}},
            None,
            r"the slots of 2 sequences take 0.\d+ MB, over max_kv_mb of the .* 0.1",
        ),
        ({"deadline": 0.0}, None, r"measuring 4 of them takes about \d+ s, more than the budget had left"),
    ],
)
@needs_kernels
def test_why_callers_are_served_one_at_a_time(changes: dict[str, Any], plan: Any, said: str) -> None:
    import re

    made = bench(**changes)
    winner = recorded(made) if plan is None else made.original.with_transforms(plan)
    kept, found = callers.measure(winner, made)
    assert kept is winner
    assert found is not None
    assert not found.rows
    assert re.search(f"^callers are served one at a time: .*{said}", found.reason), found.reason


@needs_kernels
def test_threads_that_run_out_keep_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench()
    winner = recorded(made)
    without_threads(monkeypatch)
    kept, found = callers.measure(winner, made)
    assert kept is winner
    assert found is not None
    assert found.reason == "callers are served one at a time: can't start new thread"


def test_memory_that_runs_out_keeps_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr("autotune.runtime.cache.rows.RowCache.__init__", no_room)
    with on_a_gpu():
        made = bench()
        winner = made.original.with_transform(PLANS["cuda"])
        kept, found = callers.measure(winner, made)
    assert kept is winner
    assert found is not None
    assert found.reason == "callers are served one at a time: CUDA out of memory. Tried to allocate 20 GiB."


@needs_kernels
def test_real_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured on a real model; only the decision is not left to this machine's clock."""
    monkeypatch.setattr(callers, "decide", lambda found, limit: (4 * (found.differing == 0), "as they say"))
    loads = list[EngineLoad]()
    monkeypatch.setattr(callers, "step_times", lambda *given: loads.extend(given[:2]) or step_times(*given))
    made = bench()
    winner = recorded(made)
    kept, found = callers.measure(winner, made)
    assert found is not None
    assert loads[-1].queried > loads[-1].reused == 0  # the same prompts came again, and each was computed
    assert found.reason == "callers are decoded together: as they say"
    assert [point.callers for point in found.points] == [1, 2, 4]
    single, *many = found.points
    assert len(found.alone_tokens_per_s) == len(single.tokens_per_s) == len(single.ttft_s)
    assert len(single.ttft_s) in LOOKS
    assert all(len(point.tokens_per_s) == callers.ROUNDS for point in many)
    assert [len(point.ttft_s) for point in many] == [4 * callers.ROUNDS] * 2
    assert all(len(point.ratios) == len(point.tokens_per_s) for point in found.points)
    assert all(pace > 0 for point in found.points for pace in point.tpot_s)
    assert found.long_prompt == 128 - 12
    assert found.gap_s is not None
    assert found.gap_s > 0
    assert {1} <= found.steps_s.keys() <= {1, 2, 4}  # on a busy machine four answers may never be under way at once
    assert all(step_s > 0 for step_s in found.steps_s.values())
    assert kept.traffic is winner.traffic is made.original.traffic is not None
    assert isinstance(kept.engine, Engine)
    assert kept.engine.counts["requests"] > 3 * 12


def test_a_step_s_time_is_the_mean_between_two_moments() -> None:
    before = EngineLoad(steps={1: 10, 2: 4}, stepped_s={1: 1.0, 2: 3.0})
    after = EngineLoad(steps={1: 20, 2: 4, 3: 1, 4: 2}, stepped_s={1: 1.5, 2: 3.0, 3: 7.0, 4: 0.5})
    assert step_times(before, after, (1, 2, 4)) == pytest.approx({1: 0.05, 4: 0.25})


@needs_kernels
def test_fewer_rows_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory for keys and values has room for three of four, and the pace allows two."""
    monkeypatch.setattr(callers, "decide", lambda found, limit: (2, "as they say"))
    plain = bench()
    row_mb = bytes_per_row(recorded(plain)) / 1e6
    made = bench(batching={"max_kv_mb": 3.5 * row_mb, "max_queue": 7, "max_wait_ms": 2.0})
    kept, found = callers.measure(recorded(made), made)
    assert found is not None
    assert [point.callers for point in found.points] == [1, 2, 3]
    assert str(kept.transforms[-1]) == str(ContinuousBatching("decode", 2, 7, 2.0))
    engine = kept.engine
    assert isinstance(engine, Engine)
    assert (engine.most_rows, engine.most_waiting, engine.wait_s) == (2, 7, 0.002)


@pytest.mark.parametrize(
    ("where", "tie_nats", "kept"),
    [
        pytest.param(nullcontext, math.inf, False, marks=needs_kernels, id="to the bit on a CPU"),
        pytest.param(on_a_gpu, 0.05, False, id="by more than rounding on a GPU"),
        pytest.param(on_a_gpu, math.inf, True, id="by less"),
    ],
)
def test_answers_that_differ_are_counted(
    where: Any, tie_nats: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "decide", lambda found, limit: decide(at_twice(found)))
    made = bench(tie_nats=tie_nats)
    choose = ContinuousBatching.apply

    def spoilt(self: ContinuousBatching, variant: Variant) -> None:
        choose(self, variant)
        engine = variant.engine
        assert isinstance(engine, Engine)
        logits = engine.sequences.logits

        def wrong() -> Any:
            found = logits()
            if sum(request is not None for request in engine.sequences.rows) > 2:
                found[:, 7] += 100
            return found

        monkeypatch.setattr(engine.sequences, "logits", wrong)

    monkeypatch.setattr(ContinuousBatching, "apply", spoilt)
    with where():
        winner = made.original.with_transform(PLANS[made.original.device.kind])
        serves, found = callers.measure(winner, made)
    assert found is not None
    assert (serves is not winner) is kept
    assert (found.tied > 0, found.differing > 0) == (kept, not kept)
    if kept:
        assert f"{found.tied} answers parted from those of a request alone where two tokens are as good" in found.reason
    else:
        assert f"{found.differing} answers were not those of the same requests alone" in found.reason


def at_twice(found: Sharing) -> Sharing:
    """What was measured, with the rates of a machine that gains from several callers."""
    ratios = {1: 1.0, 2: 1.5, 4: 2.0}
    return replace(found, points=tuple(replace(point, ratios=(ratios[point.callers],)) for point in found.points))


@pytest.mark.parametrize(
    ("ratios", "clear"),
    [
        ([0.99] * 12, True),
        ([0.9] * 12, True),
        ([0.94, 1.0] * 6, False),
        ([0.96, 0.97, 0.98, 0.99] * 3, False),
        ([0.96, *[0.98, 0.99, 1.0] * 5], True),
        ([1.02, *[0.92, 0.93, 0.94] * 5], True),
    ],
)
def test_what_a_single_caller_gets_is_measured_until_it_is_clear(ratios: list[float], clear: bool) -> None:
    assert is_clear(ratios) is clear


@pytest.mark.parametrize(("clear_at", "requests"), [(1, 12), (2, 24), (3, 48), (9, 48)])
def test_a_single_caller_s_requests_are_served_both_ways_in_alternate_order(
    clear_at: int, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench()
    asked, looked = list[str](), list[int]()

    def ask(self: Any, model: Any, prompt: Any, tokens: int) -> Any:
        asked.append("together" if model is self.together else "alone")
        return callers._Answer(len(prompt), (1,) * tokens, (0.0, *(float(n + 1) for n in range(tokens))))

    monkeypatch.setattr(callers._Measurement, "_ask", ask)
    monkeypatch.setattr(callers, "is_clear", lambda ratios: (looked.append(len(ratios)), len(looked) == clear_at)[1])
    alone, single = callers._Measurement(made.original, made.original, made, time.monotonic)._single()
    assert len(alone) == len(single) == requests
    assert asked == ["together", *["together", "alone", "alone", "together"] * (requests // 2)]
    assert looked == [12, 24, 48][: min(clear_at, 3)]


@pytest.mark.parametrize(
    ("one", "other", "after"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 4, 3], 1), ([], [], None), ([1, 2], [1, 2, 3], None), ([5], [6], 0)],
)
def test_where_answers_part(one: list[int], other: list[int], after: int | None) -> None:
    assert quality.parted(one, other) == after


def test_two_tokens_are_a_tie_within_so_many_nats() -> None:
    variant, prompt = Variant(tiny("llama")), token_prompts(1)[0]
    with torch.no_grad():
        logits = variant.original(torch.tensor([[*prompt, 9]])).logits[0, -1]
    first, second = logits.topk(2).indices.tolist()
    apart = float(logits[first] - logits[second])
    for nats, is_tie in ((1.01 * apart, True), (0.99 * apart, False)):
        assert ties.is_tie(variant, prompt, [9, first, 5], [9, second, 6], nats) is is_tie
    assert not ties.is_tie(variant, prompt, [9], [9, first], math.inf), "one ends where the other goes on"
