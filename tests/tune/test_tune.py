"""What a search came to as a plan and a report; a plan from disk, from its first answer to its verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import autotune
from autotune import workload
from autotune.errors import MeasurementError, PlanError, TransformError
from autotune.machine import hardware
from autotune.machine.hardware import Hardware
from autotune.report import Report
from autotune.runtime.traffic import Traffic
from autotune.runtime.variant import Variant
from autotune.transforms.lean_loop import LeanLoop
from autotune.tune import fingerprint, run, search_lock
from autotune.tune import policy as policies
from autotune.tune.bench import LiveBench
from autotune.tune.budget import least
from autotune.tune.choose import SearchState
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.plan import Plan, Trial, TrialOutcome
from autotune.tune.record import report_of
from autotune.tune.replay import replay
from autotune.tune.run import conclude, tune
from autotune.tune.search import Found
from autotune.validate import Latency, Quality, Speedup, Verdict, quality
from autotune.validate.score import CandidateError
from tests.models import tiny, token_prompts
from tests.report.test_report import DIAGNOSES, HARDWARE, ORIGINAL, Shrink, profile

GAIN = Speedup(1.5, 1.4, 1.6, 8)
QUALITY = Quality("strict", Verdict.PASS, "as good", mean_kld=0.0, same_top=1.0, tokens=64)
NO_GAIN = Speedup(1.0, 0.99, 1.01, 8)
SLOWER = Latency(Verdict.FAIL, "no gain of 3 %", NO_GAIN, NO_GAIN, NO_GAIN, 0.01)
KEPT = Plan(Fingerprint("", "", {}, "", "", "strict"), (LeanLoop(),), summary=report_of(ORIGINAL).to_dict())


def latency(verdict: Verdict) -> Latency:
    return Latency(verdict, "1.50x as fast", GAIN, GAIN, GAIN, 0.01)


class Meter:
    """A machine of which others took a share."""

    def __init__(self, share: float | None) -> None:
        self._share = share

    def elsewhere(self) -> float | None:
        return self._share


@dataclass
class ScriptedBench:
    """Answers and verifies as the test says."""

    original: Variant
    cannot_answer: str = ""
    verified: Any = (QUALITY, latency(Verdict.PASS))
    hardware = Hardware("cpu", "test", "AVX2", 2, 1 << 34, 25e9, {"float32": 140e9}, None, {})
    cached_as = None  # nothing is kept
    log: list[str] = field(default_factory=list)

    def answer(self, variant: Variant) -> None:
        self.log.append("answered")
        if self.cannot_answer:
            raise CandidateError(self.cannot_answer)

    def reverify(self, variant: Variant) -> Any:
        self.log.append("verified")
        if isinstance(self.verified, Exception):
            raise self.verified
        return self.verified

    def serve(self, variant: Variant) -> None:
        self.log.append("the plan serves" if variant.transforms else "the original serves")


@pytest.mark.parametrize(
    ("script", "log", "holds"),
    [
        ({}, ["answered", "the plan serves", "verified"], True),
        ({"cannot_answer": "no kernel"}, ["answered", "the original serves"], False),
        *(
            ({"verified": verified}, ["answered", "the plan serves", "verified", "the original serves"], False)
            for verified in [(QUALITY, latency(Verdict.FAIL)), (QUALITY, None), TransformError("no")]
        ),
    ],
)
def test_a_kept_plan_serves_from_its_first_answer_until_it_is_disproved(
    script: dict[str, Any], log: list[str], holds: bool
) -> None:
    bench = ScriptedBench(Variant(tiny("llama")), **script)
    tuned = replay(KEPT, bench, 0.0, bench.serve, Meter(None))
    assert bench.log == log
    assert (tuned is not None) == holds
    if tuned is not None:
        assert tuned.variant.transforms == KEPT.transforms
        assert "replayed and re-verified" in tuned.verdict


@pytest.mark.parametrize("shown", [True, False])
def test_nobody_waits_for_the_report_of_a_kept_plan(shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = ScriptedBench(Variant(tiny("llama")))

    def read(record: Mapping[str, Any]) -> Report:
        bench.log.append("shown")
        if not shown:
            raise PlanError("the report in it cannot be shown")
        return Report(record)

    monkeypatch.setattr("autotune.tune.replay.read", read)
    tuned = replay(KEPT, bench, 0.0, bench.serve, Meter(None))
    end = [] if shown else ["the original serves"]
    assert bench.log == ["answered", "the plan serves", "verified", "shown", *end]
    assert (tuned is not None) == shown


def test_the_machine_is_measured_between_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic, alone = Traffic(), list[bool]()

    def probe(*_: object, turn: Callable[[], AbstractContextManager[object]], **__: object) -> Any:
        with turn():
            alone.append(traffic._measuring is not None)
        raise MeasurementError("that is enough")

    monkeypatch.setattr(hardware, "probe", probe)
    work = workload.Workload(tuple(map(tuple, token_prompts(4))), new_tokens=4)
    with pytest.raises(MeasurementError, match="enough"):
        tune(tiny("llama"), work, policies.load("lossless"), cache=False, traffic=traffic)
    assert alone == [True]


@pytest.mark.parametrize(("elsewhere", "believed"), [(None, True), (0.01, True), (0.23, False)])
def test_what_others_took_is_in_the_report_and_slow_beside_them_is_no_plan(
    elsewhere: float | None, believed: bool
) -> None:
    model = tiny("llama")
    original, policy = Variant(model), policies.load("balanced")
    work = workload.read(token_prompts(4), tokenizer=None, model=model)
    bench: Any = SimpleNamespace(original=original, workload=work, policy=policy, hardware=HARDWARE)
    before = SearchState(original, profile(0.093, 0.032), DIAGNOSES)
    trial = Trial(Shrink(), "smaller weights", "decode", TrialOutcome.REJECTED, "no gain", latency=SLOWER)
    nothing = Fingerprint("", "", {}, "", "", "strict")
    tuned = conclude(Found(before, before, (trial,)), bench, nothing, 0.0, Meter(elsewhere))
    assert tuned.report.to_dict()["elsewhere"] == elsewhere
    assert (tuned.doubt is None, tuned.noisy) == (believed, not believed)
    assert ("This machine was busy: 23 % of the CPU time went elsewhere." in str(tuned.report)) != believed


class SearchedError(Exception):
    """Instead of a search."""


@pytest.mark.parametrize(
    ("made_here", "quick", "full", "verdict", "log"),
    [
        (True, Verdict.PASS, None, Verdict.PASS, ["served"]),
        (True, Verdict.INCONCLUSIVE, None, Verdict.PASS, ["served"]),  # enough to see that nothing broke since
        (False, Verdict.PASS, None, Verdict.PASS, []),  # of another machine: it serves once it is proven here
        (False, Verdict.PASS, None, Verdict.FAIL, ["searched"]),
        (False, Verdict.INCONCLUSIVE, Verdict.PASS, Verdict.PASS, ["judged"]),
        (False, Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE, Verdict.PASS, ["judged", "searched"]),
        (False, Verdict.INCONCLUSIVE, Verdict.FAIL, Verdict.PASS, ["judged", "searched"]),
    ],
)
def test_a_plan_that_was_given_is_verified_before_anything_is_searched(
    made_here: bool,
    quick: Verdict,
    full: Verdict | None,
    verdict: Verdict,
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def search(*_: Any, **__: Any) -> None:
        seen.append("searched")
        raise SearchedError

    def judge(exam: Any, *_: Any) -> Quality:
        assert exam
        seen.append("judged")
        assert full is not None
        return replace(QUALITY, verdict=full)

    seen = list[str]()
    monkeypatch.setattr(run, "search", search)
    monkeypatch.setattr(quality, "judge", judge)
    monkeypatch.setattr(LiveBench, "_spot", lambda *_, **__: (replace(QUALITY, verdict=quick), latency(verdict)))
    model, policy = tiny("llama"), policies.load("balanced")
    work = workload.read(token_prompts(4), tokenizer=None, model=model)
    identity = fingerprint.of(model, hardware.identify(model), work, policy, None)
    given = replace(KEPT, fingerprint=identity if made_here else replace(identity, hardware="another"))

    def serve(variant: Variant) -> None:
        if variant.transforms:
            seen.append("served")

    def tuned() -> Any:
        return run.tune(model, work, policy, cache=False, plan=given, serve=serve)

    if "searched" not in log:
        assert tuned().variant.transforms == KEPT.transforms
    else:
        with pytest.raises(SearchedError):
            tuned()
    assert seen == log


@pytest.mark.parametrize("differs", ["", "hardware", "workload", "policy"])
def test_a_plan_that_keeps_the_original_counts_only_where_it_was_made(
    differs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(*_: Any, **__: Any) -> None:
        raise SearchedError

    monkeypatch.setattr(run, "search", search)
    model, policy, said = tiny("llama"), policies.load("balanced"), list[str]()
    work = workload.read(token_prompts(4), tokenizer=None, model=model)
    identity = fingerprint.of(model, hardware.identify(model), work, policy, None)
    made_for = replace(identity, **{differs: "another"}) if differs else identity
    given = replace(KEPT, transforms=(), fingerprint=made_for)
    if differs:
        with pytest.raises(SearchedError):
            run.tune(model, work, policy, cache=False, plan=given, notify=said.append)
        assert "the plan that was given keeps the original" in said[0]
        assert not any("re-verifying" in each for each in said)
    else:
        assert "kept the original" in run.tune(model, work, policy, cache=False, plan=given).verdict


def test_a_plan_that_another_process_found_meanwhile_is_verified(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def awaited(mine: Any, identity: Fingerprint, most_s: float, *_: Any) -> Plan:
        assert mine.take()
        assert most_s == 3 * least(policy.budget_s)
        return replace(KEPT, fingerprint=identity)

    monkeypatch.setattr(search_lock, "awaited", awaited)
    monkeypatch.setattr(LiveBench, "reverify", lambda self, variant: (QUALITY, latency(Verdict.PASS)))
    model, policy = tiny("llama"), policies.load("balanced")
    work = workload.read(token_prompts(4), tokenizer=None, model=model)
    assert run.tune(model, work, policy).variant.transforms == KEPT.transforms


def test_a_plan_of_another_model_is_refused() -> None:
    model, policy = tiny("llama"), policies.load("balanced")
    work = workload.read(token_prompts(4), tokenizer=None, model=model)
    with pytest.raises(PlanError, match="made for model"):
        run.tune(model, work, policy, cache=False, plan=KEPT)
    with pytest.raises(PlanError, match="made for model"):
        autotune.wrap(model, plan=KEPT)
    assert not hasattr(model, "autotune")
