"""What rules a candidate or a step out before it is tried, on quiet machines and on disturbed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from autotune.diagnose.diagnosis import Diagnosis
from autotune.errors import Blocker
from autotune.machine.hardware import DOUBT, Hardware
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.tune.choose import SearchState, rule_out, unavailable, why_not
from autotune.tune.plan import Trial, TrialOutcome
from autotune.tune.policy import PolicyStep
from autotune.validate.limits import Limits
from autotune.workload import Workload
from tests.models import tiny

QUIET = Hardware("cpu", "test", "AVX2", 2, 1 << 34, 10e9, {"float32": 100e9, "bfloat16": 1e9}, None, {})
DISTURBED = replace(QUIET, disturbed=True)


@dataclass(frozen=True)
class Bounded(Transform):
    """Promises what the peaks allow: a token of 100 ms whose bytes or FLOPs take the rest."""

    moved_bytes: float = 0.0
    flops: float = 0.0
    dtype: str = "float32"
    own: float = 1.0
    blocker: str = ""

    name: ClassVar[str] = "bounded"
    stage: ClassVar[Stage] = Stage.WEIGHTS

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        return Blocker(self.blocker) if self.blocker else None

    def predict(self, profile: Any, hardware: Hardware) -> Mapping[Any, float]:
        floor_s = max(self.moved_bytes / hardware.bandwidth_bytes_per_s, self.flops / hardware.flops_per_s[self.dtype])
        return {"decode": 0.1 / floor_s if floor_s else self.own}


# transform -> whether it is ruled out with measured peaks, and with disturbed ones
CEILINGS = {
    "far enough from its floor": (Bounded(moved_bytes=0.5e9), False, False),
    "at its floor in bytes": (Bounded(moved_bytes=0.99e9), True, False),
    "at its floor in FLOPs": (Bounded(flops=9.9e9), True, False),
    "a worse floor than any disturbance explains": (Bounded(flops=9.9e9, dtype="bfloat16"), True, True),
    "nothing to gain, whatever the peaks": (Bounded(), True, True),
}


@pytest.mark.parametrize(("transform", "quiet", "disturbed"), CEILINGS.values(), ids=CEILINGS)
@pytest.mark.parametrize("blocker", ["", "no compiler"])
def test_a_ceiling_from_disturbed_peaks_rules_nothing_out(
    transform: Bounded, quiet: bool, disturbed: bool, blocker: str
) -> None:
    transform = replace(transform, blocker=blocker)
    state = SearchState(Variant(tiny("llama")), "a profile", {})
    for hardware, wanted in ((QUIET, quiet), (DISTURBED, disturbed)):
        predicted = None if blocker else transform.predict("a profile", hardware)["decode"]
        trial = Trial(transform, "step", "decode", TrialOutcome.SKIPPED, "", predicted=predicted)
        found = rule_out(trial, "decode", state, Limits(min_gain=0.02), hardware)
        expected = TrialOutcome.SKIPPED if wanted else TrialOutcome.BLOCKED if blocker else None
        assert (found and found.outcome) == expected


@pytest.mark.parametrize(
    ("found", "perhaps", "called"),
    [
        ("memory", (), True),
        ("compute", (), False),
        ("compute", ("memory",), True),
        ("compute", ("kv-cache",), False),
    ],
)
def test_a_step_is_called_for_by_what_a_phase_may_be_bound_by(found: Any, perhaps: Any, called: bool) -> None:
    step = PolicyStep("narrower weights", "decode", (), bottlenecks=frozenset({"memory", "mixed"}))
    diagnosis = Diagnosis("decode", found, "because", 2.0, 0.5, perhaps)
    reason = why_not(step, {"decode": diagnosis}, DISTURBED)
    assert reason == (None if called else "decode is compute-bound; this helps where it is memory or mixed-bound")


@pytest.mark.parametrize(
    ("options", "bandwidth", "flops"),
    [({}, DOUBT, DOUBT), ({"flops": False}, DOUBT, 1), ({"bandwidth": False}, 1, DOUBT)],
)
def test_disturbed_peaks_may_be_higher_and_others_are_what_they_are(
    options: dict[str, bool], bandwidth: float, flops: float
) -> None:
    assert QUIET.at_best(**options) is QUIET
    best = DISTURBED.at_best(**options)
    assert best.bandwidth_bytes_per_s == bandwidth * 10e9
    assert best.flops_per_s == {"float32": flops * 100e9, "bfloat16": flops * 1e9}


@pytest.mark.parametrize(
    ("new_tokens", "phase", "offered"), [(1, "decode", False), (2, "decode", True), (1, "both", True)]
)
def test_nothing_is_tried_for_decode_where_nothing_is_decoded(new_tokens: int, phase: Any, offered: bool) -> None:
    variant = Variant(tiny("llama"), workload=Workload(((5, 6, 7),), new_tokens))
    reason = unavailable(Bounded(phase), variant, QUIET)
    assert (reason is None) == offered
    assert offered or "one new token" in str(reason)
