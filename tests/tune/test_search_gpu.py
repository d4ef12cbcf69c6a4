"""The search over a GPU's weight formats on scripted times: what is slower in one bucket is rejected, naming it.

The times are made up after what the formats are known for; the steps are those of the built-in policies, and pairs,
intervals and verdicts are the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from autotune import transforms
from autotune.diagnose.diagnosis import Diagnosis
from autotune.machine.hardware import Hardware
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.tune import policy as policies
from autotune.tune.choose import parameter_count, why_not
from autotune.tune.plan import Trial
from autotune.tune.policy import Choice, Policy, PolicyStep
from autotune.tune.search import Found, search
from autotune.validate import Latency, Verdict, latency
from autotune.validate.timing import Timing
from autotune.workload import Bucket
from tests.models import tiny
from tests.tune.test_search import Phase, Profiled, Scripted, ScriptedBench

H100 = Hardware("cuda", "NVIDIA H100", "9.0", 2, 80 << 30, 2.9e12, {"bfloat16": 700e12}, None, {})
A100 = replace(H100, name="NVIDIA A100", capability="8.0")
BUCKETS = tuple(Bucket(batch=batch, prompt_tokens=512, new_tokens=64) for batch in (1, 8))
ORIGINAL = {1: 8.0, 8: 8.6}  # milliseconds per step by batch
GAINS = {1: 5.0, 8: 5.6}


@dataclass
class TimedBench(ScriptedBench):
    """A bench whose races are real ones over scripted milliseconds per step."""

    steps_ms: dict[str, Mapping[int, float]] = field(default_factory=dict)  # label -> batch -> milliseconds
    policy: Policy | None = None

    def race(self, incumbent: Variant, candidate: Variant, phase: str) -> Latency:
        limits = self.policy.limits if self.policy else policies.load("balanced").limits
        arms = (self.arm(incumbent), self.arm(candidate))
        return latency.race(*arms, BUCKETS, objective="tpot", limits=limits, noise=0.005, clock=lambda: 0.0)

    def arm(self, variant: Variant) -> latency.Arm:
        steps_ms = self.steps_ms[self.label(variant)]

        def time(bucket: Bucket, turn: int) -> Timing:
            tpot_s = steps_ms[bucket.batch] * (1 + 0.002 * (turn % 3)) / 1e3
            return Timing(0.05, tpot_s, 0.05 + (bucket.new_tokens - 1) * tpot_s)

        return time


def tune(name: str, hardware: Hardware, monkeypatch: pytest.MonkeyPatch, **steps_ms: Mapping[int, float]) -> Found:
    """Search a policy's weight steps for decode; a format without times is unavailable."""

    def scripted(transform: str, params: Mapping[str, Any], phase: Any = "both") -> Transform:
        label = str(params.get("scheme", transform))
        missing = "" if label in steps_ms else "not in this test"
        return Scripted(phase=phase, label=label, promises=2.0, missing=missing)

    policy = policies.load(name)
    weights = [step for step in policy.steps if step.name.startswith("narrower weights for decode")]
    chosen = replace(policy, steps=tuple(replace(step, parameters=None) for step in weights))
    monkeypatch.setattr(transforms, "make", scripted)
    bench = TimedBench(steps_ms={"": ORIGINAL, **steps_ms}, policy=chosen)
    return search(Variant(tiny("llama")), chosen, hardware, bench)


def trial(found: Found, label: str) -> Trial:
    return next(t for t in found.trials if t.transform.params["label"] == label)


@pytest.mark.parametrize("hardware", [H100, A100], ids=lambda hardware: hardware.name)
@pytest.mark.parametrize("name", ["balanced", "latency", "throughput"])
@pytest.mark.parametrize(
    ("scheme", "times", "bucket"),
    [
        # LLM.int8 waits for the device at every layer: slower than FP16 at batch 1, whatever it does at 8
        ("int8", {1: 14.0, 8: 8.0}, "b1/"),
        ("int8", {1: 14.0, 8: 5.0}, "b1/"),
        # INT4 unpacks what a batch of 8 multiplies: 2.3x faster at batch 1, 1.4x slower at 8, 1.3x faster on average
        ("int4_hqq", {1: 3.5, 8: 12.0}, "b8/"),
        ("int4_hqq", {1: 2.0, 8: 9.3}, "b8/"),
    ],
)
def test_slower_in_one_bucket_is_rejected_and_the_bucket_named(
    scheme: str,
    times: Mapping[int, float],
    bucket: str,
    name: str,
    hardware: Hardware,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = tune(name, hardware, monkeypatch, **{scheme: times})
    rejected = trial(found, scheme)
    assert str(rejected.outcome) == "rejected", rejected.reason
    assert bucket in rejected.reason
    assert found.after.variant.transforms == ()
    assert rejected.latency is not None
    slow = {label: by.speedups["tpot"].ratio for label, by in rejected.latency.buckets.items()}
    for made in BUCKETS:  # each bucket's own figure is kept
        expected = ORIGINAL[made.batch] / times[made.batch]
        assert slow[made.label] == pytest.approx(expected, rel=0.01)


def test_what_gains_in_every_bucket_is_kept_beside_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune(
        "balanced",
        H100,
        monkeypatch,
        int4_hqq={1: 3.5, 8: 12.0},
        int8={1: 14.0, 8: 8.0},
        float8_weight_only=GAINS,
    )
    outcomes = {label: str(trial(found, label).outcome) for label in ("int4_hqq", "int8", "float8_weight_only")}
    assert outcomes == {"int4_hqq": "rejected", "int8": "rejected", "float8_weight_only": "accepted"}
    assert [t.label for t in found.after.variant.transforms] == ["float8_weight_only"]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Costs(Phase):
    operator_count: int = 100


@dataclass
class SteadyBench(ScriptedBench):
    """A bench on which both phases take as long whatever serves."""

    def profile(self, variant: Variant) -> Any:
        return Profiled(self.label(variant), {"prefill": Costs(0.1), "decode": Costs(0.1)})


@pytest.mark.parametrize(("changed", "outcome"), [("decode", "accepted"), ("prefill", "skipped")])
def test_weights_that_were_too_slow_are_compiled_together_unless_prefill_changed_since(
    changed: Any, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling alone is for prefill that launches limit; this one is bound by memory."""
    weights, attention, compiling = (
        {"label": "weights", "promises": 9.0},
        {"label": "attention", "promises": 4.0, "at": Stage.ATTENTION.value},
        {"label": "compiling", "promises": 1.5, "at": Stage.COMPILE.value},
    )
    steps = (
        PolicyStep("weights", "prefill", (Choice("scripted", weights, "prefill"),)),
        PolicyStep("attention", changed, (Choice("scripted", attention, changed),)),
        PolicyStep("compiling", "prefill", (Choice("scripted", compiling, "prefill"),), frozenset({"overhead"})),
    )
    make = transforms.make

    def scripted(name: str, params: Mapping[str, Any], phase: Any = "both") -> Transform:
        return Scripted(phase=phase, **params) if name == "scripted" else make(name, params, phase)

    monkeypatch.setattr(transforms, "make", scripted)
    bench = SteadyBench(speed={"weights": Verdict.FAIL})
    chosen = replace(policies.load("balanced"), steps=steps, budget_s=1e6)
    trials = search(Variant(tiny("llama")), chosen, H100, bench).trials
    assert [(trial.step, str(trial.outcome)) for trial in trials] == [
        ("weights", "rejected"),
        ("attention", "accepted"),
        ("compiling", outcome),
    ]
    named = [transform.params["label"] for transform in trials[-1].transforms]
    assert named == (["weights", "compiling"] if outcome == "accepted" else ["compiling"])
    assert outcome == "accepted" or "prefill is memory-bound" in trials[-1].reason


def test_the_model_is_counted_only_where_a_policy_asks() -> None:
    diagnoses: Any = {phase: Diagnosis(phase, "memory", "", 2.0, 0.5) for phase in ("prefill", "decode")}
    asking = policies.load("balanced")
    step = next(step for step in asking.steps if step.parameters is not None)
    model = Variant(tiny("llama"))
    counted = parameter_count(model, asking)
    assert counted == sum(p.numel() for p in model.original.parameters())
    assert "for models of >= 1e9 parameters" in (why_not(step, diagnoses, H100, counted) or "")
    silent = replace(asking, budget_s=60.0, steps=tuple(s for s in asking.steps if s.parameters is None))
    assert parameter_count(Variant(object()), silent) is None
