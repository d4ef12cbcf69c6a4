"""Whether callers are decoded together: the decision as a table, and measurements of real tiny models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from autotune.machine.hardware import Hardware
from autotune.runtime import kernels
from autotune.runtime.batching.rows import sizes
from autotune.runtime.traffic import Traffic
from autotune.runtime.variant import Variant
from autotune.transforms.continuous_batching import ContinuousBatching, Together
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.step_program import StepProgram
from autotune.tune import callers, policy
from autotune.tune.callers import CallersPoint, Sharing, decide
from autotune.workload import Workload
from tests.models import PAD, tiny, token_prompts

needs_kernels = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
CPU = Hardware("cpu", "a CPU", "AVX2", 1, 8 * 10**9, 20e9, {"float32": 1e11}, "g++", {})
WORK = Workload(tuple(map(tuple, token_prompts(5))), new_tokens=12)


@pytest.mark.parametrize(("most", "numbers"), [(2, (1, 2)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (16, (1, 2, 4, 8, 16))])
def test_numbers_of_callers(most: int, numbers: tuple[int, ...]) -> None:
    assert sizes(most) == numbers


def measured(*points: tuple[int, tuple[float, ...]], differing: int = 0) -> Sharing:
    """Rates where one caller at a time gets 100, 100 and 50 tokens per second in three rounds."""
    return Sharing(
        "",
        alone_tokens_per_s=(100.0, 100.0, 50.0),
        points=tuple(CallersPoint(callers, rates, (0.1,)) for callers, rates in points),
        differing=differing,
    )


@pytest.mark.parametrize(
    ("found", "accepted", "said"),
    [
        (measured((1, (100, 100, 50)), (4, (200, 200, 100))), True, r"4 callers get 2.00x \(2.00 to 2.00\)"),
        (measured((1, (98, 99, 48)), (4, (180, 200, 105))), True, "and a single caller 0.98x"),
        (measured((1, (99, 99, 49)), (2, (150, 150, 75)), (4, (140, 150, 70))), True, "2 callers get 1.50x"),
        (measured((1, (96, 96, 48)), (4, (200, 200, 100))), False, "a single caller would get 0.96x"),
        (measured((1, (100, 100, 50)), (4, (105, 109, 54))), False, "4 callers get 1.08x"),
        (measured((1, (100, 100, 50)), (4, (200, 200, 49))), False, r"2.00x \(0.98 to 2.00\)"),
        (measured((1, (100, 100, 50)), (4, (200, 200, 100)), differing=2), False, "2 answers were not those"),
    ],
)
def test_the_decision(found: Sharing, accepted: bool, said: str) -> None:
    import re

    decision, reason = decide(found)
    assert decision is accepted
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
    free: float = 1e12
    said: list[str] = field(default_factory=list)

    def notify(self, step: str) -> None:
        self.said.append(step)

    def free_bytes(self) -> float:
        return self.free


def bench(**changes: Any) -> Bench:
    asked = replace(policy.load("balanced"), max_batch=changes.pop("max_batch", 4))
    return Bench(Variant(tiny("llama"), Traffic(), WORK), asked, **changes)


def recorded(made: Bench) -> Variant:
    return made.original.with_transform(StepProgram("decode", slots=128))


def test_a_policy_that_does_not_ask_measures_nothing() -> None:
    made = bench(max_batch=1)
    assert callers.measure(made.original, made) == (made.original, None)
    assert made.said == []


@pytest.mark.parametrize(
    ("changes", "plan", "said"),
    [
        ({}, [LeanLoop()], "needs a recorded decode step"),
        ({"free": 1000.0}, None, r"slots of 4 sequences take 0.00 GB, 0.00 GB are free"),
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
    assert not found.accepted
    assert re.search(f"^callers are served one at a time: .*{said}", found.reason), found.reason


@needs_kernels
def test_real_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured on a real model; only the decision is not left to this machine's clock."""
    monkeypatch.setattr(callers, "decide", lambda found: (found.differing == 0, "as they say"))
    made = bench()
    winner = recorded(made)
    kept, found = callers.measure(winner, made)
    assert found is not None
    assert found.reason == "callers are decoded together: as they say"
    assert isinstance(kept.loop, Together)
    assert [point.callers for point in found.points] == [1, 2, 4]
    assert all(len(point.tokens_per_s) == callers.ROUNDS == len(found.alone_tokens_per_s) for point in found.points)
    assert [len(point.ttft_s) for point in found.points] == [4 * callers.ROUNDS] * 3
    assert found.long_prompt == 128 - 12
    assert found.gap_s is not None
    assert found.gap_s > 0
    assert kept.traffic is winner.traffic is made.original.traffic is not None
    assert kept.loop.engine.counts["requests"] > 3 * 12


@needs_kernels
def test_answers_that_differ_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench()
    choose = ContinuousBatching.apply

    def spoilt(self: ContinuousBatching, variant: Variant) -> None:
        choose(self, variant)
        assert isinstance(variant.loop, Together)
        engine = variant.loop.engine
        logits = engine._logits

        def wrong() -> Any:
            found = logits()
            if sum(request is not None for request in engine._rows) > 2:
                found[:, 7] += 100
            return found

        monkeypatch.setattr(engine, "_logits", wrong)

    monkeypatch.setattr(ContinuousBatching, "apply", spoilt)
    winner = recorded(made)
    kept, found = callers.measure(winner, made)
    assert kept is winner
    assert found is not None
    assert found.differing > 0
    assert "answers were not those of the same requests alone" in found.reason
