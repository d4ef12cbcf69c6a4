"""What a search came to as a plan and a report, on figures made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autotune import plan as plans
from autotune import policy as policies
from autotune import workload
from autotune.choose import State
from autotune.plan import Outcome, Trial
from autotune.search import Found
from autotune.tune import conclude
from autotune.validate import Latency, Speedup, Verdict
from autotune.variant import Variant
from tests.models import tiny, token_prompts
from tests.test_report import DIAGNOSES, HARDWARE, Shrink, profile

NO_GAIN = Speedup(1.0, 0.99, 1.01, 8)
SLOWER = Latency(Verdict.FAIL, "no gain of 3 %", NO_GAIN, NO_GAIN, NO_GAIN, 0.01)


class Meter:
    """A machine of which others took a share."""

    def __init__(self, share: float | None) -> None:
        self._share = share

    def elsewhere(self) -> float | None:
        return self._share


@pytest.mark.parametrize(("elsewhere", "believed"), [(None, True), (0.01, True), (0.23, False)])
def test_what_others_took_is_in_the_report_and_slow_beside_them_is_no_plan(
    elsewhere: float | None, believed: bool
) -> None:
    model = tiny("llama")
    original, policy = Variant(model), policies.load("balanced")
    work = workload.read(token_prompts(4), tokenizer=None, model=model)
    bench: Any = SimpleNamespace(original=original, workload=work, policy=policy, hardware=HARDWARE)
    before = State(original, profile(0.093, 0.032), DIAGNOSES)  # type: ignore[no-untyped-call]
    trial = Trial(Shrink(), "smaller weights", "decode", Outcome.REJECTED, "no gain", latency=SLOWER)
    nothing = plans.Fingerprint("", "", {}, "", "", "strict")
    tuned = conclude(Found(before, before, (trial,)), bench, nothing, 0.0, Meter(elsewhere))  # type: ignore[arg-type]
    assert tuned.report.to_dict()["elsewhere"] == elsewhere
    assert (tuned.doubt is None, tuned.noisy) == (believed, not believed)
    assert ("This machine was busy: 23 % of the CPU time went elsewhere." in str(tuned.report)) != believed
