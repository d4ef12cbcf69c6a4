"""The search's decisions on scripted numbers: what is tried, in which order, and what becomes of it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from autotune import transforms
from autotune.diagnose.diagnosis import Diagnosis
from autotune.errors import Blocker, BudgetSpentError, DeviceError, TransformError
from autotune.machine.hardware import Hardware
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.tune import choose, compose, order, trying
from autotune.tune.plan import Confirmation, TrialOutcome
from autotune.tune.policy import Choice, Policy, PolicyStep
from autotune.tune.search import Found, search
from autotune.validate import Latency, Quality, Speedup, Verdict
from autotune.validate.limits import Limits
from autotune.workload import Workload

HARDWARE = Hardware("cpu", "test", "AVX2", 2, 1 << 34, 25e9, {"float32": 140e9}, None, {})


GAIN = Speedup(1.5, 1.4, 1.6, 8)
CONFIRMED = Confirmation(
    None, Quality("strict", Verdict.PASS, "ok"), Latency(Verdict.PASS, "ok", GAIN, GAIN, GAIN, 0.01)
)


@dataclass(frozen=True)
class Scripted(Transform):
    """A transform that does what the test says."""

    label: str = "a"
    promises: float = 2.0
    missing: str = ""
    blocker: str = ""
    refuses: str = ""
    breaks: str = ""
    raises: str = ""  # the question that it answers by an exception
    idle: str = ""
    takes: float = 0.0
    needs: str = ""  # label of a transform whose layers it shares
    excluded: str = ""  # label of a transform after which it cannot be applied
    at: int = 1

    name: ClassVar[str] = "scripted"
    summary: ClassVar[str] = "for tests"

    @property
    def stage(self) -> Stage:  # type: ignore[override]
        return Stage(self.at)

    def asked(self, question: str) -> None:
        if self.raises == question:
            raise ZeroDivisionError(f"oops in {question}")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        self.asked("unavailable")
        if self.needs and self.needs not in labels(variant):
            return f"there is no {self.needs}"
        return Blocker(self.blocker) if self.blocker else self.missing or None

    def excludes(self, other: Transform) -> str | None:
        return f"not after {self.excluded}" if self.excluded == other.params["label"] else None

    def predict(self, profile: Any, hardware: Hardware) -> Mapping[Any, float]:
        self.asked("predict")
        return dict.fromkeys(self.phases, self.promises)

    def extra_bytes(self, variant: Variant) -> float:
        self.asked("extra_bytes")
        return self.takes

    def apply(self, variant: Variant) -> None:
        if self.refuses:
            raise TransformError(self.refuses)
        if self.needs and self.needs not in labels(variant):
            raise TransformError(f"there is no {self.needs}")
        if self.breaks:
            raise ZeroDivisionError(self.breaks)

    def took_effect(self, variant: Variant) -> str | None:
        return self.idle or None


def labels(variant: Variant) -> list[str]:
    return [transform.params["label"] for transform in variant.transforms]


@dataclass(frozen=True)
class Phase:
    seconds: float


@dataclass(frozen=True)
class Profiled:
    label: str
    phases: Mapping[str, Phase]


@dataclass
class ScriptedBench:
    """A bench whose verdicts are looked up by the label of the newest transform."""

    quality: dict[str, Verdict] = field(default_factory=dict)
    speed: dict[str, Verdict] = field(default_factory=dict)
    bottlenecks: dict[str, str] = field(default_factory=dict)  # label, or "" for the original -> decode's bottleneck
    glances: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    confirmations: dict[str, Confirmation] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)  # label -> what refines it
    free: float = 8e9
    least: float = 0.0
    race_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # label -> of both phases
    examined: bool = True
    drowned: bool = False
    calls: list[str] = field(default_factory=list)
    budget: tuple[float, float] = (0.0, 0.0)

    @staticmethod
    def label(variant: Variant) -> str:
        transforms: Sequence[Any] = variant.transforms
        return transforms[-1].label if transforms else ""

    def profile(self, variant: Variant) -> Any:
        label = self.label(variant)
        return Profiled(label, dict.fromkeys(("prefill", "decode"), Phase(self.seconds.get(label, 0.1))))

    def begin(self, budget_s: float, deadline: float) -> None:
        self.budget = budget_s, deadline

    def diagnose(self, profile: Any) -> Any:
        kind = self.bottlenecks.get(profile.label, "memory")
        return {phase: Diagnosis(phase, kind, "because", 2.0, 0.5) for phase in ("prefill", "decode")}

    def memory_ratio(self, variant: Variant) -> float:
        return self.memory.get(self.label(variant), 1.0)

    def risk(self, transform: Transform, make: Any, most_s: float) -> str | None:
        return None

    def first_speedup(self, incumbent: Variant, candidate: Variant, phase: str) -> float:
        return self.glances.get(self.label(candidate), 1.5)

    def judge(self, variant: Variant, tier: str) -> Quality:
        label = self.label(variant)
        self.calls.append(f"judge {label} {tier}")
        return Quality(tier, self.quality.get(label, Verdict.PASS), f"quality of {label}", examined=self.examined)

    def probe(self, incumbent: Variant, transform: Any, tier: str) -> Any:
        self.calls.append(f"probe {transform.label} {tier}")
        incumbent.with_transform(transform)  # as a real one does
        return self.probes.get(transform.label)

    def race(self, incumbent: Variant, candidate: Variant, phase: str) -> Latency:
        label = self.label(candidate)
        self.calls.append(f"race {self.label(incumbent) or 'original'} {label}")
        return self.latency(label)

    def latency(self, label: str) -> Latency:
        verdict = self.speed.get(label, Verdict.PASS)
        return Latency(verdict, f"speed of {label}", GAIN, GAIN, GAIN, 0.01, drowned=self.drowned)

    def confirm(self, variant: Variant, *, brief: bool = True) -> Confirmation:
        label = self.label(variant)
        self.calls.append(f"confirm {label}")
        if brief or label in self.confirmations:
            return self.confirmations.get(label, CONFIRMED)
        quality = Quality("strict", self.quality.get(label, Verdict.PASS), f"quality of {label}")
        if quality.verdict is not Verdict.PASS:
            return Confirmation(None, quality)
        return Confirmation(None, quality, self.latency(label))

    def least_s(self, profile: Any) -> float:
        return self.least

    def free_bytes(self) -> float:
        return self.free

    def describe_error(self, error: Exception) -> str:
        return f"{type(error).__name__}: {error}"

    def free_memory(self) -> None: ...


@dataclass(frozen=True)
class ScriptedProbe:
    """Twenty layers, the first of which cause all the divergence; "a" without them is called "a2"."""

    causes: int = 1
    layers: ClassVar[dict[str, int]] = {f"layer{letter}": 100 for letter in "abcdefghijklmnopqrst"}
    wider: ClassVar[Any] = Scripted(label="wide", promises=1.5)
    wider_form: ClassVar[str] = "at 8 bits"

    @property
    def bad(self) -> list[str]:
        return list(self.layers)[: self.causes]

    def divergence(self, names: Any) -> float:
        return 0.06 * sum(name in self.bad for name in names)

    def shortfall(self, wide: str) -> str | None:
        return None if set(self.bad) <= set(wide.split(",")) else "mean KLD is 0.06"

    def widened(self, wide: str) -> Transform:
        return Scripted(label=f"a{len(wide.split(',')) + 1}", phase="decode")


def policy(*steps: PolicyStep, **changes: Any) -> Policy:
    return replace(Policy("test", "", "latency", "strict", Limits(), 100.0, steps), **changes)


def step(*choices: dict[str, Any], bottlenecks: tuple[str, ...] = (), name: str = "step") -> PolicyStep:
    made = tuple(Choice("scripted", params, "decode") for params in choices)
    return PolicyStep(name, "decode", made, frozenset(bottlenecks))


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, params: Mapping[str, Any], phase: Any = "both") -> Transform:
        return Scripted(phase=phase, **params)

    monkeypatch.setattr(transforms, "make", make)


def run(bench: ScriptedBench, chosen: Policy, **options: Any) -> Found:
    return search(Variant(nn.Module()), chosen, HARDWARE, bench, **options)


def outcomes(found: Found) -> dict[str, str]:
    return {trial.transform.params["label"]: str(trial.outcome) for trial in found.trials}


@pytest.mark.fault("A1")
@pytest.mark.parametrize(
    ("choice", "bench", "outcome", "reason"),
    [
        ({}, ScriptedBench(), "accepted", "speed of a"),
        ({"missing": "for another device"}, ScriptedBench(), "unavailable", "for another device"),
        ({"blocker": "no compiler"}, ScriptedBench(), "blocked", "no compiler"),
        ({"blocker": "no compiler", "promises": 1.02}, ScriptedBench(), "skipped", "the roofline allows 1.02x at best"),
        ({"takes": 7e9}, ScriptedBench(), "accepted", "speed of a"),
        ({"takes": 7.5e9}, ScriptedBench(), "blocked", "it takes 7.5 GB beside what serves now, and 7.2 GB"),
        ({"promises": 1.02}, ScriptedBench(), "skipped", "the roofline allows 1.02x at best"),
        ({"refuses": "tied weights"}, ScriptedBench(), "blocked", "tied weights"),
        ({"breaks": "oops"}, ScriptedBench(), "error", "ZeroDivisionError: oops"),
        ({"idle": "nothing replaced"}, ScriptedBench(), "blocked", "it had no effect: nothing replaced"),
        ({}, ScriptedBench(memory={"a": 3.0}), "rejected", "3.00x the original's memory"),
        ({}, ScriptedBench(glances={"a": 0.05}), "rejected", "took 20.0x as long"),
        ({}, ScriptedBench(quality={"a": Verdict.FAIL}), "rejected", "quality of a"),
        ({}, ScriptedBench(quality={"a": Verdict.INCONCLUSIVE}), "inconclusive", "quality of a"),
        ({}, ScriptedBench(quality={"a": Verdict.INCONCLUSIVE}, examined=False), "blocked", "quality of a"),
        ({}, ScriptedBench(quality={"a": Verdict.ERROR}), "error", "quality of a"),
        ({}, ScriptedBench(speed={"a": Verdict.FAIL}), "rejected", "speed of a"),
        ({}, ScriptedBench(speed={"a": Verdict.FAIL}, drowned=True), "inconclusive", "speed of a"),
        ({}, ScriptedBench(speed={"a": Verdict.INCONCLUSIVE}), "inconclusive", "speed of a"),
    ],
)
def test_one_candidate(choice: dict[str, Any], bench: ScriptedBench, outcome: str, reason: str) -> None:
    found = run(bench, policy(step(choice)))
    (trial,) = found.trials
    assert (trial.outcome, reason in trial.reason) == (TrialOutcome(outcome), True), trial.reason
    assert bool(found.after.variant.transforms) == (outcome == "accepted")


QUESTIONS = ("unavailable", "predict", "extra_bytes")


@pytest.mark.fault("A1")
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_transform_that_raises_when_it_is_asked_is_an_error_and_the_search_goes_on(question: str) -> None:
    found = run(ScriptedBench(), policy(step({"label": "bad", "raises": question, "promises": 9.0}, {"label": "good"})))
    assert outcomes(found) == {"bad": "error", "good": "accepted"}
    reasons = {trial.transform.params["label"]: trial.reason for trial in found.trials}
    assert reasons["bad"] == f"it could not be considered: ZeroDivisionError: oops in {question}"


def test_a_prediction_that_is_no_number_is_an_error() -> None:
    found = run(ScriptedBench(), policy(step({"label": "bad", "promises": float("nan")}, {"label": "good"})))
    assert outcomes(found) == {"bad": "error", "good": "accepted"}


def test_a_device_that_dies_when_a_transform_is_asked_ends_the_search() -> None:
    class Dead(ScriptedBench):
        def describe_error(self, error: Exception) -> str:
            raise DeviceError("restart the process")

    with pytest.raises(DeviceError):
        run(Dead(), policy(step({"raises": "extra_bytes"})))


def test_a_failed_quality_is_never_timed() -> None:
    bench = ScriptedBench(quality={"a": Verdict.FAIL})
    run(bench, policy(step({})))
    assert not any(call.startswith("race") for call in bench.calls)


REFINED = "kept layera at 8 bits, 5% of the weights: alone it causes 0.06 of 0.06 nat"


@pytest.mark.parametrize(
    ("choice", "bench", "expected", "reason"),
    [
        ({}, {"probes": {"a": ScriptedProbe()}}, {"a": "rejected", "a2": "accepted"}, f"{REFINED}; speed of a2"),
        ({}, {}, {"a": "rejected"}, "quality of a"),
        (
            {},
            {"probes": {"a": ScriptedProbe(20)}},
            {"a": "rejected"},
            "quality of a; layera alone causes 0.06 of 1.2 nat; even with",
        ),
        (
            {},
            {"probes": {"a": ScriptedProbe()}, "speed": {"a2": Verdict.FAIL}},
            {"a": "rejected", "a2": "rejected"},
            f"{REFINED}; speed of a2",
        ),
        (
            {},
            {"probes": {"a": ScriptedProbe(2)}, "quality": {"a": Verdict.FAIL, "a3": Verdict.FAIL}},
            {"a": "rejected", "a3": "rejected"},
            "quality of a3",
        ),
        (
            {},
            {"probes": {"a": ScriptedProbe()}, "speed": {"a2": Verdict.ERROR}},
            {"a": "rejected", "a2": "error"},
            "speed of a2",
        ),
        ({}, {"probes": {"a": object()}}, {"a": "rejected"}, "its layers could not be compared: AttributeError"),
    ],
)
def test_a_scheme_that_fails_is_tried_without_the_layers_that_made_it_fail(
    choice: dict[str, Any], bench: dict[str, Any], expected: dict[str, str], reason: str
) -> None:
    scripted = ScriptedBench(**{"quality": {"a": Verdict.FAIL}} | bench)
    found = run(scripted, policy(step(choice)))
    assert outcomes(found) == expected
    assert reason in found.trials[-1].reason
    assert scripted.calls[:2] == ["judge a strict", "probe a strict"]


def test_a_refined_scheme_that_was_not_judged_says_why_and_nothing_else() -> None:
    """So that a verdict can put equal causes together."""
    bench = ScriptedBench({"a": Verdict.FAIL}, {"a3": Verdict.ERROR}, probes={"a": ScriptedProbe(2)})
    found = run(bench, policy(step({})))
    assert (found.trials[-1].outcome, found.trials[-1].reason) == (TrialOutcome.ERROR, "speed of a3")


def test_a_refined_scheme_has_to_promise_more_than_the_next_choice() -> None:
    bench = ScriptedBench(quality={"a": Verdict.FAIL}, probes={"a": ScriptedProbe()})
    found = run(bench, policy(step({"promises": 2.0}, {"label": "b", "promises": 1.995})))
    assert outcomes(found) == {"a": "rejected", "b": "accepted"}
    assert "it promises less than others" in found.trials[0].reason


@pytest.mark.parametrize("verdict", [Verdict.INCONCLUSIVE, Verdict.ERROR])
def test_what_did_not_fail_is_not_refined(verdict: Verdict) -> None:
    bench = ScriptedBench(quality={"a": verdict}, probes={"a": ScriptedProbe()})
    run(bench, policy(step({})))
    assert bench.calls == ["judge a strict"]


def test_the_most_promising_is_tried_first_and_the_next_races_against_it() -> None:
    bench = ScriptedBench()
    run(bench, policy(step({"label": "slow", "promises": 1.2}, {"label": "fast", "promises": 3.0})))
    assert [c for c in bench.calls if c.startswith("race")] == ["race original fast", "race fast slow"]


def test_removing_one_bottleneck_shows_the_next() -> None:
    bench = ScriptedBench(bottlenecks={"": "memory", "weights": "overhead", "graph": "compute"})
    found = run(
        bench,
        policy(
            step({"label": "graph"}, bottlenecks=("overhead",), name="overhead"),
            step({"label": "weights"}, bottlenecks=("memory",), name="memory"),
            step({"label": "cache"}, bottlenecks=("kv-cache",), name="cache"),
        ),
    )
    assert [t.label for t in found.after.variant.transforms] == ["weights", "graph"]  # type: ignore[attr-defined]
    assert outcomes(found) == {"weights": "accepted", "graph": "accepted", "cache": "skipped"}
    assert "decode is compute-bound" in found.trials[-1].reason


def test_steps_for_other_devices_are_skipped_with_the_reason() -> None:
    found = run(ScriptedBench(), policy(replace(step({}), devices=frozenset({"cuda"}))))
    assert found.trials[0].outcome is TrialOutcome.SKIPPED
    assert found.trials[0].reason == "only for cuda; this machine has cpu"


def test_nothing_new_is_tried_once_the_budget_is_spent() -> None:
    ticks = iter(range(0, 10_000, 60))
    found = run(
        ScriptedBench(),
        policy(step({"label": "first"}, {"label": "second", "promises": 1.5}, {"label": "third", "promises": 1.4})),
        clock=lambda: float(next(ticks)),
    )
    assert outcomes(found)["third"] == "unreached"
    assert "the budget of 100 s was spent" in found.trials[-1].reason


def test_a_refinement_that_the_budget_does_not_reach_is_on_record() -> None:
    bench = ScriptedBench(quality={"a": Verdict.FAIL}, probes={"a": ScriptedProbe()})
    found = run(bench, policy(step({})), clock=lambda: 1000.0 if "probe a strict" in bench.calls else 0.0)
    whole, refined = found.trials
    assert (whole.outcome, refined.outcome) == (TrialOutcome.REJECTED, TrialOutcome.UNREACHED)
    assert "judge a strict" in bench.calls
    assert len([call for call in bench.calls if call.startswith("judge")]) == 1
    assert refined.reason == "the budget of 100 s was spent"


@pytest.mark.parametrize(("lossless", "tier"), [(True, "lossless"), (False, "strict")])
def test_lossless_transforms_are_held_to_the_lossless_tier(
    lossless: bool, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "lossless", lossless)
    bench = ScriptedBench()
    run(bench, policy(step({})))
    assert bench.calls[0] == f"judge a {tier}"


@pytest.mark.fault("A1")
def test_a_candidate_that_fails_while_it_runs_costs_nothing_else() -> None:
    class Failing(ScriptedBench):
        def race(self, incumbent: Variant, candidate: Variant, phase: str) -> Latency:
            if self.label(candidate) == "bad":
                raise MemoryError("out of memory")
            return super().race(incumbent, candidate, phase)

    found = run(Failing(), policy(step({"label": "bad", "promises": 3.0}, {"label": "good"})))
    assert outcomes(found) == {"bad": "error", "good": "accepted"}


class Exhausted(ScriptedBench):
    """A device that runs out of memory while "a" is judged, or dies of it."""

    death: str = ""

    def judge(self, variant: Variant, tier: str) -> Quality:
        if self.label(variant) == "a":
            memory = torch.ones(8)
            self.memory_of_a = weakref.ref(memory)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().judge(variant, tier)

    def describe_error(self, error: Exception) -> str:
        if self.death:
            raise DeviceError(self.death)
        return super().describe_error(error)

    def free_memory(self) -> None:
        self.calls.append("tidied" if self.memory_of_a() is None else "the exception still holds the memory")


@pytest.mark.fault("A13")
def test_a_trial_that_runs_out_of_memory_gives_it_back_and_the_next_runs() -> None:
    bench = Exhausted()
    found = run(bench, policy(step({"label": "a", "promises": 3.0}, {"label": "b"})))
    assert outcomes(found) == {"a": "error", "b": "accepted"}
    assert "tidied" in bench.calls, "memory was given back while the exception held on to it"
    assert bench.calls.index("tidied") < bench.calls.index("race original b")


@pytest.mark.fault("A22")
def test_a_dead_device_ends_the_search() -> None:
    bench = Exhausted()
    bench.death = "the device is dead"
    with pytest.raises(DeviceError, match="the device is dead"):
        run(bench, policy(step({"label": "a", "promises": 3.0}, {"label": "b"})))
    assert "race original b" not in bench.calls


@pytest.mark.fault("A25")
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_not_taken_for_a_failed_trial(stop: type[BaseException]) -> None:
    class Interrupted(ScriptedBench):
        def judge(self, variant: Variant, tier: str) -> Quality:
            raise stop

    with pytest.raises(stop):
        run(Interrupted(), policy(step({})))


# The draft: what promises the most, in one piece


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted transforms count as autotune's own, as those of a draft have to."""
    for module in (compose, order, trying):
        monkeypatch.setattr(module, "is_foreign", lambda transform: False)


WEIGHTS = step({"label": "int4", "promises": 4.0}, {"label": "int8", "promises": 3.0}, name="weights")
PROGRAM = step(
    {"label": "program", "promises": 2.5, "at": 6}, {"label": "loop", "promises": 1.5, "at": 5}, name="overhead"
)
PREFILL = PolicyStep(
    "prefill", "prefill", (Choice("scripted", {"label": "fused", "promises": 1.4, "at": 3}, "prefill"),)
)


def tried(bench: ScriptedBench) -> list[str]:
    return [call for call in bench.calls if call.startswith(("race", "confirm"))]


def committed(found: Found) -> list[str]:
    return sorted(transform.label for transform in found.after.variant.transforms)  # type: ignore[attr-defined]


def candidates(found: Found) -> dict[str, str]:
    def named(transforms: tuple[Transform, ...]) -> str:
        return "+".join(str(transform.params["label"]) for transform in transforms)

    return {
        named(t.transforms) + (f" for {named(t.instead_of)}" if t.instead_of else ""): str(t.outcome)
        for t in found.trials
    }


@pytest.mark.usefixtures("own")
def test_the_best_of_every_step_is_tried_in_one_piece_and_confirmed_at_once() -> None:
    bench = ScriptedBench()
    found = run(bench, policy(WEIGHTS, PROGRAM, PREFILL))
    assert tried(bench) == ["confirm program"], "held-out prompts prove it at once: nothing was chosen by others"
    assert found.trials[0].target == "both"
    assert candidates(found) == {
        "int4+fused+program": "accepted",
        "int8 for int4": "skipped",
        "loop for program": "skipped",
    }
    assert committed(found) == ["fused", "int4", "program"]
    assert found.confirmation is not None
    assert found.confirmation.holds
    assert found.confirmation.quality is found.trials[0].quality


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("holds", "served"), [(True, ["int8+program", "a2+program"]), (False, [])])
def test_what_is_confirmed_is_handed_over_while_the_search_goes_on(holds: bool, served: list[str]) -> None:
    bench, given = ScriptedBench(probes={"int4": ScriptedProbe(1)}), list[str]()
    if not holds:
        bench.confirmations = dict.fromkeys(["program", "a2", "int8", "loop"], Confirmation("it failed"))
    run(
        bench,
        policy(WEIGHTS, PROGRAM),
        kept=lambda variant: given.append("+".join(sorted(t.label for t in variant.transforms))),
    )
    assert given == served


@pytest.mark.parametrize(
    ("own", "replaced", "now_s", "expected"),
    [
        # 100 ms before: 4x leaves 25 ms and 2.5x 40 ms, so that 15 ms are saved from what there is now
        (4.0, 2.5, 0.040, 40 / 25),
        (4.0, 2.5, 0.030, 30 / 15),
        (2.5, 2.5, 0.030, 1.0),
        (2.5, 4.0, 0.030, 30 / 45),  # worse than what it would replace
        (1.0, 4.0, 0.025, 25 / 100),  # given back whole
        (4.0, 2.5, 0.010, 20.0),  # predicted to save more than there is
    ],
)
def test_an_exchange_saves_the_difference_from_the_time_as_it_is_now(
    own: float, replaced: float, now_s: float, expected: float
) -> None:
    before, now = (
        choose.SearchState(Variant(nn.Module()), Profiled("", {"decode": Phase(seconds)}), {})
        for seconds in (0.1, now_s)
    )
    assert choose.exchange(own, replaced, "decode", before, now) == pytest.approx(expected)


@pytest.mark.usefixtures("own")
def test_an_alternative_is_weighed_against_the_plan_and_not_against_the_original() -> None:
    weights = step({"label": "int8", "promises": 2.0}, {"label": "int4", "promises": 2.04}, name="weights")
    bench = ScriptedBench(seconds={"program": 0.012})  # int4 saves 0.98 ms of 100 more: a twelfth of these 12
    found = run(bench, policy(weights, PROGRAM))
    alternative = next(trial for trial in found.trials if trial.instead_of)
    assert alternative.predicted == pytest.approx(12 / (12 - 100 * (1 / 2.0 - 1 / 2.04)))
    assert candidates(found)["int4 for int8"] == "accepted"


@pytest.mark.usefixtures("own")
def test_a_draft_takes_the_narrowest_weights_whose_loss_will_do_and_the_others_are_refined_later() -> None:
    bench = ScriptedBench(probes={"int4": ScriptedProbe(1)})
    found = run(bench, policy(WEIGHTS, PROGRAM))
    assert candidates(found) == {
        "int8+program": "accepted",
        "int4 for int8": "rejected",
        "a2 for int8": "accepted",
        "loop for program": "skipped",
    }
    assert "read at once, mean KLD is 0.06" in next(t.reason for t in found.trials if t.instead_of)
    assert not any(call.startswith("judge int4") for call in bench.calls), "its loss was known"
    assert committed(found) == ["a2", "program"]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("bench", "expected", "left"),
    [
        (
            {"speed": {"program": Verdict.FAIL}},
            {"int4+fused+program": "rejected", "int4+program": "rejected"},
            ["fused", "int4", "int8", "loop"],
        ),
        ({"quality": {"program": Verdict.FAIL}}, {"int4+fused+program": "rejected"}, ["fused", "int4", "int8", "loop"]),
        (
            {"confirmations": {"program": Confirmation("it ran out of memory")}},
            {"int4+fused+program": "error"},
            ["fused", "int4", "int8", "loop"],
        ),
    ],
)
def test_a_draft_that_fails_is_tried_by_phase_and_then_step_by_step(
    bench: dict[str, Any], expected: dict[str, str], left: list[str]
) -> None:
    found = run(ScriptedBench(**bench), policy(WEIGHTS, PROGRAM, PREFILL))
    outcomes = candidates(found)
    assert {name: outcomes[name] for name in expected} == expected
    assert committed(found) == left


@pytest.mark.usefixtures("own")
def test_a_draft_has_one_transform_of_a_stage_and_no_threads() -> None:
    """Two that save the same time would be promised it twice."""
    again = step({"label": "other", "promises": 2.0}, name="other weights")
    threads = step({"label": "threads", "promises": 1.9, "at": 8}, name="threads")
    found = run(ScriptedBench(), policy(WEIGHTS, again, PROGRAM, threads))
    assert candidates(found)["int4+program"] == "accepted"
    assert {"other", "threads"} <= set(candidates(found)), "they are tried by themselves"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("promises", "min_gain", "drafted"), [(1.0, 0.0, True), (1.0, 0.03, False), (1.1, 0.0, False)])
def test_what_saves_memory_and_no_time_is_in_the_draft_beside_others_of_its_stage(
    promises: float, min_gain: float, drafted: bool
) -> None:
    table = step({"label": "table", "promises": promises}, name="one table")
    found = run(ScriptedBench(), policy(WEIGHTS, table, PROGRAM, limits=Limits(min_gain=min_gain)))
    assert candidates(found)["int4+table+program" if drafted else "int4+program"] == "accepted"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    "hindrance", [{"missing": "no"}, {"takes": 1e12}, {"refuses": "no"}, {"breaks": "no"}, {"idle": "no"}]
)
def test_what_cannot_be_had_is_not_in_the_draft(hindrance: dict[str, Any]) -> None:
    weights = step({"label": "int4", "promises": 4.0, **hindrance}, {"label": "int8", "promises": 3.0}, name="weights")
    found = run(ScriptedBench(), policy(weights, PROGRAM))
    assert candidates(found)["int8+program"] == "accepted"


def prefill(*choices: dict[str, Any]) -> PolicyStep:
    return PolicyStep("prefill", "prefill", tuple(Choice("scripted", params, "prefill") for params in choices))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_transform_that_raises_is_left_out_of_a_draft_and_of_replacements(question: str) -> None:
    """The draft has one transform for each step; the step's other choices are asked what they gain over it."""
    bad = {"label": "bad", "raises": question, "promises": 9.0}
    steps = step(bad, {"label": "a"}, name="one"), step({"label": "b", "at": 2}, name="two")
    found = run(ScriptedBench(), policy(*steps))
    assert candidates(found)["a+b"] == "accepted"
    assert [str(t.outcome) for t in found.trials if t.transform.params["label"] == "bad"] == ["error"]


@pytest.mark.usefixtures("own")
def test_a_draft_may_share_what_an_earlier_part_of_it_made() -> None:
    """The loss is then read on the draft, because without the other part there is nothing to share."""
    shared = prefill({"label": "shared", "needs": "int4", "promises": 2.0}, {"label": "own", "promises": 2.0})
    bench = ScriptedBench()
    found = run(bench, policy(WEIGHTS, shared))
    assert committed(found) == ["int4", "shared"]
    assert "probe shared strict" in bench.calls


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("promises", "outcome"), [(1.5, "skipped"), (2.15, "accepted")])
def test_an_alternative_may_share_what_the_rest_of_the_plan_made(promises: float, outcome: str) -> None:
    choices = prefill({"label": "own", "promises": 2.0}, {"label": "shared", "needs": "int4", "promises": promises})
    found = run(ScriptedBench(), policy(WEIGHTS, choices))
    assert candidates(found)["int4+own"] == "accepted"
    assert candidates(found)["shared for own"] == outcome


@pytest.mark.usefixtures("own")
def test_a_replacement_comes_before_what_shares_its_layers() -> None:
    shared = prefill({"label": "shared", "needs": "weights", "promises": 2.0})
    weights = step(
        {"label": "weights", "promises": 2.0, "takes": 1.0}, {"label": "weights", "promises": 2.15}, name="weights"
    )
    found = run(ScriptedBench(), policy(weights, shared))
    assert candidates(found) == {"weights+shared": "accepted", "weights for weights": "accepted"}
    assert [transform.params["takes"] for transform in found.after.variant.transforms] == [0.0, 0.0]


@pytest.mark.usefixtures("own")
def test_what_an_alternative_would_take_away_from_others_counts_as_missing() -> None:
    """Without int4 there is nothing for "shared" to share; int8 is predicted on the original then."""
    shared = prefill({"label": "shared", "needs": "int4", "promises": 2.0})
    weights = step({"label": "int4", "promises": 2.0}, {"label": "int8", "promises": 2.0}, name="weights")
    found = run(ScriptedBench(), policy(weights, shared))
    assert committed(found) == ["int4", "shared"]
    assert candidates(found)["int8 for int4"] == "skipped"
    weights = step({"label": "int4", "promises": 2.0}, {"label": "int8", "promises": 2.15}, name="weights")
    found = run(ScriptedBench(), policy(weights, shared))
    (alternative,) = (trial for trial in found.trials if trial.instead_of)
    assert alternative.outcome is TrialOutcome.UNAVAILABLE
    assert "shared" in alternative.reason
    assert "needs what it would replace: there is no int4" in alternative.reason


@pytest.mark.usefixtures("own")
def test_an_alternative_that_the_rest_of_the_plan_excludes_is_not_even_made(monkeypatch: pytest.MonkeyPatch) -> None:
    program = step({"label": "program", "excluded": "int8", "promises": 2.0, "at": 5}, name="program")
    weights = step({"label": "int4", "promises": 2.0}, {"label": "int8", "promises": 2.15}, name="weights")
    made, apply = list[str](), Scripted.apply

    def noted(self: Scripted, variant: Variant) -> None:
        made.append(self.label)
        apply(self, variant)

    monkeypatch.setattr(Scripted, "apply", noted)
    found = run(ScriptedBench(), policy(weights, program))
    assert committed(found) == ["int4", "program"]
    (alternative,) = (trial for trial in found.trials if trial.instead_of)
    assert alternative.outcome is TrialOutcome.UNAVAILABLE
    assert alternative.reason.endswith("needs what it would replace: not after int8")
    assert "int8" not in made


@pytest.mark.usefixtures("own")
def test_after_a_draft_what_is_worth_the_most_comes_first() -> None:
    small = step({"label": "small", "promises": 1.1, "at": 7}, bottlenecks=("overhead",), name="small")
    large = step({"label": "large", "promises": 1.8, "at": 7}, bottlenecks=("overhead",), name="large")
    bench = ScriptedBench(bottlenecks={"": "memory", "program": "overhead", "large": "overhead", "small": "overhead"})
    run(bench, policy(WEIGHTS, small, large, PROGRAM))
    assert tried(bench) == [
        "confirm program",
        "race program large",
        "confirm large",
        "race large small",
        "confirm small",
    ]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("objective", "first"), [("latency", "faster"), ("memory", "smaller")])
def test_for_memory_steps_come_in_the_policys_order_because_they_promise_time(objective: Any, first: str) -> None:
    smaller = step({"label": "smaller", "promises": 1.1, "at": 7}, bottlenecks=("overhead",), name="smaller")
    faster = step({"label": "faster", "promises": 1.8, "at": 7}, bottlenecks=("overhead",), name="faster")
    bench = ScriptedBench(bottlenecks={"": "memory"} | dict.fromkeys(("program", "smaller", "faster"), "overhead"))
    run(bench, policy(WEIGHTS, smaller, faster, PROGRAM, objective=objective))
    assert tried(bench)[1] == f"race program {first}"


@pytest.mark.usefixtures("own")
def test_guessing_ahead_comes_last_whatever_it_promises() -> None:
    guess = step({"label": "guess", "promises": 8.0, "at": 9}, bottlenecks=("overhead",), name="guess")
    small = step({"label": "small", "promises": 1.1, "at": 7}, bottlenecks=("overhead",), name="small")
    bench = ScriptedBench(bottlenecks={"": "memory", "program": "overhead", "guess": "overhead", "small": "overhead"})
    run(bench, policy(WEIGHTS, guess, small, PROGRAM))
    assert tried(bench)[1:] == ["race program small", "confirm small", "race small guess", "confirm guess"]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("new_tokens", "first"), [(2, "prompt"), (200, "token")])
def test_a_phase_counts_for_its_share_of_a_request(new_tokens: int, first: str) -> None:
    """Prefill takes as long as a token: half of a request of two tokens, and a two-hundredth of a long one."""
    prompt = PolicyStep(
        "prompt", "prefill", (Choice("scripted", {"label": "prompt", "promises": 3.0, "at": 7}, "prefill"),)
    )
    token = step({"label": "token", "promises": 1.5, "at": 7}, bottlenecks=("overhead",), name="token")
    prompt = replace(prompt, bottlenecks=frozenset({"overhead"}))
    bench = ScriptedBench(bottlenecks={"": "memory"} | dict.fromkeys(("program", "prompt", "token"), "overhead"))
    work = Workload(((5, 6, 7),), new_tokens)
    search(Variant(nn.Module(), None, work), policy(WEIGHTS, prompt, token, PROGRAM), HARDWARE, bench)
    assert tried(bench)[1] == f"race program {first}"


@pytest.mark.parametrize(("promised", "first"), [(2.15, "a"), (2.3, "b")])
def test_of_what_promises_about_as_much_the_policys_first_comes_first(promised: float, first: str) -> None:
    bench = ScriptedBench()
    run(bench, policy(step({"label": "a"}, {"label": "b", "promises": promised})))
    assert bench.calls[0] == f"judge {first} strict"


@dataclass
class Slow(ScriptedBench):
    """A trial takes 60 s, to confirm it 30."""

    now: float = 0.0

    def judge(self, variant: Variant, tier: str) -> Quality:
        self.now += 60.0
        return super().judge(variant, tier)

    def confirm(self, variant: Variant, *, brief: bool = True) -> Confirmation:
        self.now += 30.0
        return super().confirm(variant, brief=brief)


@pytest.mark.parametrize(("seconds", "outcome"), [(0.1, "unreached"), (0.05, "accepted")])
def test_after_a_faster_variant_the_next_trial_is_expected_to_be_shorter(seconds: float, outcome: str) -> None:
    """Of the 90 s, half were requests of the original: 67.5 s at twice the speed, and 70 s are left."""
    bench = Slow(seconds={"a": seconds})
    work, steps = Workload(((5, 6, 7),), 8), (step({}), step({"label": "b"}, name="second"))
    original, chosen = Variant(nn.Module(), None, work), policy(*steps, budget_s=160.0)
    found = search(original, chosen, HARDWARE, bench, clock=lambda: bench.now)
    assert outcomes(found) == {"a": "accepted", "b": outcome}


def test_what_held_out_prompts_do_not_confirm_is_not_kept_and_says_so() -> None:
    failed = replace(CONFIRMED, latency=replace(CONFIRMED.latency, verdict=Verdict.FAIL, reason="no gain of 3 %"))  # type: ignore[type-var]
    bench = ScriptedBench(confirmations={"a": failed})
    found = run(bench, policy(step({"promises": 3.0}, {"label": "b"})))
    assert outcomes(found) == {"a": "rejected", "b": "accepted"}
    assert found.trials[0].reason == "speed of a; on held-out prompts, no gain of 3 %"
    assert (committed(found), found.confirmation) == (["b"], CONFIRMED)
    alone = run(ScriptedBench(confirmations={"a": failed}), policy(step({})))
    assert (committed(alone), alone.confirmation) == ([], failed)
    assert [t.label for t in alone.refuted] == ["a"]  # type: ignore[attr-defined]


def test_what_is_confirmed_stays_whatever_fails_before_and_after_it() -> None:
    failed = Confirmation("it ran out of memory")
    bench = ScriptedBench(confirmations={"a": failed, "c": failed})
    choices = ({"promises": 3.0}, {"label": "b", "promises": 2.5}, {"label": "c", "promises": 2.0})
    found = run(bench, policy(step(*choices)))
    assert outcomes(found) == {"a": "inconclusive", "b": "accepted", "c": "inconclusive"}
    assert (committed(found), found.confirmation) == (["b"], CONFIRMED)


def test_a_brief_confirmation_leaves_the_quality_that_chose_and_says_so() -> None:
    weak = Quality("strict", Verdict.INCONCLUSIVE, "4 prompts")
    found = run(ScriptedBench(confirmations={"a": replace(CONFIRMED, quality=weak, brief=True)}), policy(step({})))
    assert found.trials[0].reason.startswith("speed of a; confirmed on a few held-out prompts")
    assert found.confirmation is not None
    assert found.confirmation.quality == found.trials[0].quality


def test_a_budget_that_pays_for_no_trial_is_told_at_once_with_one_that_would() -> None:
    bench = ScriptedBench(least=250.0)
    found = run(bench, policy(step({})), clock=lambda: 0.0)
    assert outcomes(found) == {"a": "unreached"}
    assert found.trials[0].reason == (
        "judging and timing a candidate: it takes about 250 s, 100 s of the budget of 100 s were left; "
        "give a budget of 250 s or more"
    )
    assert bench.calls == []


def test_what_the_rest_of_the_budget_does_not_pay_for_is_not_begun() -> None:
    """By what the trial before took."""
    bench = ScriptedBench(speed={"a": Verdict.FAIL})
    seconds = {"judge": 60.0}
    now = [0.0]

    def judge(variant: Variant, tier: str) -> Quality:
        now[0] += seconds["judge"]
        return ScriptedBench.judge(bench, variant, tier)

    bench.judge = judge  # type: ignore[method-assign]
    found = run(bench, policy(step({"promises": 3.0}, {"label": "b"})), clock=lambda: now[0])
    assert outcomes(found) == {"a": "rejected", "b": "unreached"}
    assert found.trials[1].reason == "it takes about 60 s, 40 s of the budget of 100 s were left"


@pytest.mark.parametrize("held_out", [False, True])
def test_a_judgement_that_the_budget_does_not_wait_for_leaves_its_candidate_untried(
    held_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spent(*_: Any, brief: bool = held_out) -> Any:
        if not brief:
            raise BudgetSpentError("the budget of 100 s was spent when 40% of its answers were compared")
        return CONFIRMED

    bench = ScriptedBench()
    monkeypatch.setattr(bench, "confirm" if held_out else "judge", spent)
    if held_out:
        for module in (compose, order, trying):
            monkeypatch.setattr(module, "is_foreign", lambda transform: False)
    found = run(bench, policy(WEIGHTS, PROGRAM) if held_out else policy(step({})))
    assert str(found.trials[0].outcome) == "unreached"
    assert found.trials[0].reason == "the budget of 100 s was spent when 40% of its answers were compared"


def test_a_winner_that_the_budget_does_not_wait_to_confirm_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(*_: Any, **__: Any) -> Any:
        raise BudgetSpentError("the budget of 100 s was spent with 40% done of comparing")

    bench = ScriptedBench()
    monkeypatch.setattr(bench, "confirm", spent)
    found = run(bench, policy(step({})))
    assert outcomes(found) == {"a": "unreached"}
    assert found.trials[0].reason.endswith("; not confirmed: the budget of 100 s was spent with 40% done of comparing")
    assert found.after is found.before


def test_a_draft_that_the_budget_does_not_wait_for_leaves_every_step_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def spent(*_: Any) -> Any:
        now[0] = 101.0
        raise BudgetSpentError("the budget of 100 s was spent")

    monkeypatch.setattr("autotune.tune.compose.compose", spent)
    found = run(ScriptedBench(), policy(WEIGHTS, PROGRAM), clock=lambda: now[0])
    assert {trial.outcome for trial in found.trials} == {TrialOutcome.UNREACHED}
    assert {trial.reason for trial in found.trials} == {"the budget of 100 s was spent"}


def test_no_race_begins_when_the_budget_is_spent() -> None:
    bench, now = ScriptedBench(), [0.0]

    def judge(variant: Variant, tier: str) -> Quality:
        now[0] = 101.0
        return ScriptedBench.judge(bench, variant, tier)

    bench.judge = judge  # type: ignore[method-assign]
    found = run(bench, policy(step({})), clock=lambda: now[0])
    assert outcomes(found) == {"a": "unreached"}
    assert found.trials[0].reason == "it is no worse, and was not timed: the budget of 100 s was spent"
    assert tried(bench) == []


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("reading_s", "reached"), [(59.0, True), (61.0, False)])
def test_the_first_trial_is_begun_only_where_the_least_it_takes_is_left(reading_s: float, reached: bool) -> None:
    bench, now = ScriptedBench(least=80.0), [0.0]

    def probe(incumbent: Variant, transform: Any, tier: str) -> None:
        now[0] = reading_s

    bench.probe = probe  # type: ignore[method-assign]
    found = run(bench, policy(WEIGHTS, PROGRAM), clock=lambda: now[0])
    assert bool(tried(bench)) == reached
    if not reached:
        assert found.trials[0].reason == "it takes about 40 s, 39 s of the budget of 100 s were left"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("ratio", "taken"), [(2.0, "int4+program"), (2.01, "int8+program")])
def test_what_would_take_too_much_memory_is_not_in_the_draft(ratio: float, taken: str) -> None:
    found = run(ScriptedBench(memory={"int4": ratio}), policy(WEIGHTS, PROGRAM))
    assert next(iter(candidates(found))) == taken
