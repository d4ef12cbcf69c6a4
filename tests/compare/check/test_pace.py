"""Latency against recorded samples, on made-up times."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autotune.compare.check import pace
from autotune.compare.check.baseline import LatencySamples
from autotune.runtime.variant import Variant
from autotune.validate import Verdict
from autotune.workload import METRICS, Bucket
from tests.models import token_prompts

BUCKET = Bucket(1, 8, 4)


def times(median_s: float, spread: float = 0.02, count: int = 16, seed: int = 0) -> tuple[float, ...]:
    return tuple(median_s * np.exp(spread * np.random.default_rng(seed).standard_normal(count)))


def paced(samples: tuple[float, ...], noise: float = 0.01) -> LatencySamples:
    return LatencySamples(BUCKET, {"tpot": samples}, noise)


@pytest.mark.parametrize(
    ("now", "noise", "verdict"),
    [
        (times(0.010, seed=1), 0.01, Verdict.PASS),
        (times(0.008, seed=1), 0.01, Verdict.PASS),
        (times(0.012, seed=1), 0.01, Verdict.FAIL),
        (times(0.020, 0.3, seed=1), 0.01, Verdict.FAIL),
        (times(0.012, seed=1), 0.10, Verdict.INCONCLUSIVE),
        (times(0.0107, seed=1), 0.01, Verdict.INCONCLUSIVE),
        (times(0.010, 0.5, seed=1), 0.01, Verdict.INCONCLUSIVE),
        (times(0.010, count=5), 0.01, Verdict.INCONCLUSIVE),
        ((), 0.01, Verdict.INCONCLUSIVE),
    ],
)
def test_slower_than_recorded(now, noise, verdict):
    found, reason, _ = pace.decide(paced(times(0.010), noise), paced(now), "tpot", 0.05)
    assert found is verdict, reason
    assert "tpot of b1/p8/n4" in reason


def test_no_false_alarm_in_hundreds_of_equal_pairs():
    found = [
        pace.decide(paced(times(1.0, 0.05, seed=k)), paced(times(1.0, 0.05, seed=1000 + k)), "tpot", 0.05)[0]
        for k in range(300)
    ]
    assert found.count(Verdict.FAIL) == 0


def test_one_new_token_has_no_time_per_further_token():
    nothing = paced((math.nan,) * 16)
    assert pace.decide(nothing, nothing, "tpot", 0.05)[0] is Verdict.PASS


class Clock:
    """Every look takes a millisecond."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1e-3
        return self.now_s


def test_measuring_takes_the_clocks_word(model):
    """A look at the start, one when generate hands the prompt over, and one for each token."""
    (found,) = pace.measure(Variant(model), [BUCKET], token_prompts(3, 8), requests=6, clock=Clock())
    assert found.bucket == BUCKET
    assert set(found.samples_s) == set(METRICS)
    assert found.samples_s["ttft"] == pytest.approx([2e-3] * len(found.samples_s["ttft"]))
    assert found.samples_s["end_to_end"] == pytest.approx([5e-3] * len(found.samples_s["ttft"]))
    assert found.noise == pytest.approx(0.0, abs=1e-9)
