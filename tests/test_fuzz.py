"""The differential fuzzer's share of the tests: the same examples every time."""

from __future__ import annotations

import warnings

import pytest
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz.machine import Machine, configured
from tests.fuzz.pair import COUNTS

EXAMPLES = 90  # about two minutes' work on two cores of 2020


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_wrapped_model_is_the_model() -> None:
    """And the examples are not vacuous: the plan serves, fails, is changed under, and comes back."""
    COUNTS.clear()
    with warnings.catch_warnings():
        run_state_machine_as_test(Machine, settings=configured(EXAMPLES, random=False))
    assert COUNTS["examples"] >= EXAMPLES
    assert COUNTS["served by the plan"] > COUNTS["calls"] / 4
    for done in (
        "changes",
        "changes undone",
        "failures injected",
        "plan switches",
        "calls in a mode",
        "calls that raise",
    ):
        assert COUNTS[done] > EXAMPLES / 10, done
