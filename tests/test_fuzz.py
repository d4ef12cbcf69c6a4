"""The differential fuzzer's share of the tests: the same examples every time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz.calls import Call
from tests.fuzz.failures import Failure
from tests.fuzz.machine import Machine, configured
from tests.fuzz.pair import COUNTS, Pair
from tests.fuzz.reverts import REVERTS

EXAMPLES = 60  # a minute's work for one core of 2020; make fuzz does more
FAILS = Failure("operation", 250)  # in the midst of decoding


def changed(name: str, kind: str = "greedy", *, undone: bool = False) -> Callable[[Pair], None]:
    def steps(pair: Pair) -> None:
        pair.change(name)
        pair.call(Call(kind))
        if undone:
            pair.undo()
            pair.call(Call(kind))

    return steps


def adapted(pair: Pair) -> None:
    pair.change("adapters")
    pair.switch("eager")
    pair.change("adapter b")
    pair.call(Call("greedy"))


def locked(pair: Pair) -> None:
    pair.change("lock")
    pair.switch("eager")


def first_in_inference_mode(pair: Pair) -> None:
    pair.call(Call("greedy", rows=2), "inference")
    pair.call(Call("greedy", rows=2))


SHORTEST: dict[str, tuple[str, Callable[[Pair], None]]] = {  # fault -> plan, and steps that show it
    "cache": ("lean", lambda pair: pair.call(Call("greedy", new=8), failure=FAILS)),
    "random numbers": ("lean", lambda pair: pair.call(Call("sampled", new=8), failure=FAILS)),
    "stream": ("lean", lambda pair: pair.call(Call("streamed", new=8), failure=FAILS)),
    "asked again": ("lean", lambda pair: pair.call(Call("processor", new=8), failure=FAILS)),
    "blame": ("lean", lambda pair: pair.call(Call("processor raises"))),
    "forward": ("lean", lambda pair: pair.call(Call("forward outside"))),
    "batch": ("slots", lambda pair: pair.call(Call("greedy"), failure=Failure("slots"))),
    "breaker": ("lean", lambda pair: pair.call(Call("greedy", new=8), failure=FAILS)),
    "hooks": ("eager", changed("hook that doubles")),
    "everything but tensors": ("eager", changed("attribute")),
    "classes": ("eager", changed("class of a norm")),
    "adapters": ("eager", adapted),
    "configuration": ("eager", changed("counted model")),
    "writes": ("half", changed("written")),
    "writes without a mark": ("half", changed("written data")),
    "no way back": ("lean", changed("attribute", undone=True)),
    "default dtype": ("slots", lambda pair: pair.call(Call("greedy"), "float64")),
    "inference mode": ("slots", first_in_inference_mode),
    "autocast": ("fused", lambda pair: pair.call(Call("dict", rows=3, length=12, new=8), "autocast")),
    "threads": ("threads", lambda pair: pair.call(Call("greedy"))),
    "alarm": ("lean", lambda pair: pair.call(Call("greedy"), failure=Failure("alarm", 50))),
    "hooks twice": ("lean", changed("hook", "forward")),
    "copies": ("lean", locked),
}


def shown(name: str) -> bool:
    plan, steps = SHORTEST[name]
    try:
        steps(Pair("llama", plan))
    except (AssertionError, TypeError):
        return True
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REVERTS)
def test_a_fault_that_comes_back_is_seen(name: str) -> None:
    """And nothing is seen where there is none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in `make fuzz`, not what another test has left: a plan brings its own number
    assert not shown(name)
    with ExitStack() as stack:
        for patch in REVERTS[name].patches:
            stack.enter_context(patch())
        assert shown(name)
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_wrapped_model_is_the_model() -> None:
    """And the examples are not vacuous: the plan serves, fails, is changed under, and comes back."""
    COUNTS.clear()
    with warnings.catch_warnings():
        run_state_machine_as_test(Machine, settings=configured(EXAMPLES, random=False, shrink=False))
    assert COUNTS["examples"] >= EXAMPLES
    assert COUNTS["served by the plan"] > COUNTS["calls"] / 6
    for done in (
        "changes",
        "changes undone",
        "failures injected",
        "plan switches",
        "calls in a mode",
        "calls that raise",
    ):
        assert COUNTS[done] > EXAMPLES / 20, done
