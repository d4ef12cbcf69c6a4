"""A plan from disk, from its first answer to its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from autotune.errors import TransformError
from autotune.hardware import Hardware
from autotune.plan import Fingerprint, Plan
from autotune.transforms.lean_loop import LeanLoop
from autotune.tune import replay
from autotune.validate import Latency, Quality, Speedup, Verdict
from autotune.validate.score import CandidateError
from autotune.variant import Variant
from tests.models import tiny
from tests.test_report import ORIGINAL

GAIN = Speedup(1.5, 1.4, 1.6, 8)
QUALITY = Quality("strict", Verdict.PASS, "as good", mean_kld=0.0, same_top=1.0, tokens=64)
KEPT = Plan(Fingerprint("", "", {}, "", "", "strict"), (LeanLoop(),), summary=ORIGINAL.to_dict())


def latency(verdict: Verdict) -> Latency:
    return Latency(verdict, "1.50x as fast", GAIN, GAIN, GAIN, 0.01)


@dataclass
class ScriptedBench:
    """Answers and verifies as the test says."""

    original: Variant
    cannot_answer: str = ""
    verified: Any = (QUALITY, latency(Verdict.PASS))
    hardware = Hardware("cpu", "test", "AVX2", 2, 1 << 34, 25e9, {"float32": 140e9}, None, {})
    log: list[str] = field(default_factory=list)

    def answer(self, variant: Variant) -> None:
        self.log.append("answered")
        if self.cannot_answer:
            raise CandidateError(self.cannot_answer)

    def reverify(self, plan: Plan, variant: Variant) -> Any:
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
    tuned = replay(KEPT, bench, 0.0, bench.serve)  # type: ignore[arg-type]
    assert bench.log == log
    assert (tuned is not None) == holds
    if tuned is not None:
        assert tuned.variant.transforms == KEPT.transforms
        assert "replayed and re-verified" in tuned.verdict
