"""Leaving out each transform of a plan: what is compared, what keeps it from being, and when the budget ends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from torch import nn

from autotune.errors import DeviceError, TransformError
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.tune.contributions import measure
from autotune.validate import Latency, Speedup, Verdict


@dataclass(frozen=True)
class Part(Transform):
    """A transform that may need another."""

    label: str = ""
    needs: str = ""
    name: ClassVar[str] = "part"
    stage: ClassVar[Stage] = Stage.WEIGHTS

    def apply(self, variant: Variant) -> None:
        if self.needs and self.needs not in labels(variant):
            raise TransformError(f"there is no {self.needs}")


def labels(variant: Variant) -> list[str]:
    return [transform.label for transform in variant.transforms]  # type: ignore[attr-defined]


def latency(ratio: float, verdict: Verdict = Verdict.PASS) -> Latency:
    found = Speedup(ratio, 0.9 * ratio, 1.1 * ratio, 5)
    return Latency(verdict, "as scripted", found, found, found, 0.01)


@dataclass
class ScriptedBench:
    """Speed-ups by the label of what is left out; each comparison takes a second."""

    original: Variant = field(default_factory=lambda: Variant(nn.Module()))
    gains: dict[str, Any] = field(default_factory=dict)
    deadline: float = 100.0
    race_s: float = 1.0
    now: float = 0.0
    compared: list[tuple[list[str], str]] = field(default_factory=list)

    def notify(self, step: str) -> None: ...

    def clock(self) -> float:
        return self.now

    def compare_briefly(self, reference: Variant, candidate: Variant, target: str) -> Latency:
        self.now += 1
        (missing,) = set(labels(candidate)) - set(labels(reference))
        self.compared.append((labels(reference), target))
        found = self.gains.get(missing, latency(1.5))
        if isinstance(found, Exception):
            raise found
        return found

    def describe_error(self, error: Exception) -> str:
        if isinstance(error, MemoryError):
            raise DeviceError("dead")
        return f"{type(error).__name__}: {error}"

    def free_memory(self) -> None: ...


PLAN = (Part("decode", "weights"), Part("decode", "program"), Part("prefill", "fused"))


def run(bench: ScriptedBench, transforms: tuple[Part, ...] = PLAN) -> dict[str, Any]:
    winner = bench.original.with_transforms(transforms)
    found = measure(winner, bench, bench.clock)
    return {c.transform.label: c.latency.tpot.ratio if c.latency else c.reason for c in found}  # type: ignore[attr-defined]


def test_each_is_left_out_in_turn_and_timed_in_its_phase() -> None:
    bench = ScriptedBench(gains={"weights": latency(2.0), "fused": latency(0.9, Verdict.FAIL)})
    assert run(bench) == {"weights": 2.0, "program": 1.5, "fused": 0.9}
    assert bench.compared == [
        (["program", "fused"], "decode"),
        (["weights", "fused"], "decode"),
        (["weights", "program"], "prefill"),
    ]


@pytest.mark.parametrize(
    ("plan", "gains", "reason"),
    [
        ((PLAN[0], Part("decode", "program", "weights")), {}, "the others need it: there is no weights"),
        (PLAN, {"weights": latency(1.0, Verdict.ERROR)}, "as scripted"),
        (PLAN, {"weights": ZeroDivisionError("oh")}, "ZeroDivisionError: oh"),
    ],
)
def test_what_cannot_be_left_out_says_why(plan: Any, gains: dict[str, Any], reason: str) -> None:
    found = run(ScriptedBench(gains=gains), plan)
    assert found.pop("weights") == reason
    assert set(found.values()) == {1.5}


def test_a_dead_device_ends_it() -> None:
    with pytest.raises(DeviceError):
        run(ScriptedBench(gains={"weights": MemoryError()}))


@pytest.mark.parametrize(
    ("deadline", "measured"), [(0.0, []), (0.5, []), (1.5, ["weights"]), (2.5, ["weights", "program"])]
)
def test_no_more_is_begun_than_the_budget_holds(deadline: float, measured: list[str]) -> None:
    found = run(ScriptedBench(deadline=deadline))
    late = "the budget had no time for it"
    assert found == {part.label: 1.5 if part.label in measured else late for part in PLAN}


def test_a_plan_of_one_has_nothing_to_tell_apart() -> None:
    assert run(ScriptedBench(), PLAN[:1]) == {}
