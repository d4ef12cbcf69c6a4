from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.tune import policy as policies
from autotune.tune.budget import GrowingBudget, known, least, longest, seconds_of
from tests.tune.test_policy import NAMES

GROWS = GrowingBudget(base_s=240, per_billion_s=20, decode_steps=5000, most_s=1800)


@pytest.mark.parametrize(
    ("budget", "device", "parameters", "decode_s", "seconds"),
    [
        (GROWS, "cuda", 8e9, 0.046, 240 + 160 + 230),
        (GROWS, "cuda", 8e9, 0.010, 240 + 160 + 50),
        (GROWS, "cuda", 135e6, 0.0, 242.7),
        (GROWS, "cuda", 70e9, 0.115, 1800),
        (GROWS, "cpu", 8e9, 0.4, 240),
        (600.0, "cuda", 8e9, 0.046, 600),
        (600.0, "cpu", 8e9, 0.4, 600),
    ],
)
def test_a_budget_grows_on_a_gpu_unless_it_is_exact(
    budget: float | GrowingBudget, device: str, parameters: float, decode_s: float, seconds: float
) -> None:
    found = seconds_of(budget, device, int(parameters), decode_s)
    assert found == pytest.approx(seconds)
    assert least(budget) <= found <= longest(budget, device)
    assert known(budget, device) == (None if budget is GROWS and device == "cuda" else found)


@pytest.mark.parametrize("name", NAMES)
def test_built_in_policies_grow_and_a_users_seconds_are_exact(name: str) -> None:
    loaded = policies.load(name)
    assert isinstance(loaded.budget_s, GrowingBudget)
    assert seconds_of(loaded.budget_s, "cuda", 10**10, 0.1) > least(loaded.budget_s)
    assert seconds_of(replace(loaded, budget_s=61.0).budget_s, "cuda", 10**10, 0.1) == 61.0


def test_a_budget_in_words() -> None:
    assert str(GROWS) == "240 s; on a GPU 20 s per 1e9 parameters and 5000 decode steps more, at most 1800 s"
