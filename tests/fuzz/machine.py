"""Random sequences of calls, changes, modes, failures, threads and plan switches, drawn and shrunk by Hypothesis."""

from __future__ import annotations

import warnings

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.fuzz import models, plans
from tests.fuzz.calls import PLAIN, Call
from tests.fuzz.failures import ERRORS, PLACES, Failure
from tests.fuzz.modes import MODES
from tests.fuzz.pair import ALL_CALLS, ALL_CHANGES, COUNTS, Pair

STEPS = 12  # in an example


def calls(kinds: list[str]) -> st.SearchStrategy[Call]:
    return st.builds(
        Call,
        kind=st.sampled_from(kinds),
        rows=st.integers(1, 3),
        length=st.integers(2, 12),
        new=st.integers(2, 8),
        seed=st.integers(0, 3),
    )


ANY, USUAL = calls(list(ALL_CALLS)), calls(list(PLAIN))
IN_THREADS = calls([*(k for k in ("greedy", "long", "dict", "stops", "padded", "beams")), "forward", "forward padded"])
FAILURES = st.builds(
    Failure,
    place=st.sampled_from([PLACES[0], *PLACES]),
    at=st.integers(0, 400),
    error=st.sampled_from(list(ERRORS)),
    lasting=st.booleans(),
)
PLANS = st.sampled_from(list(plans.PLANS))
CHANGES = st.sampled_from(list(ALL_CHANGES))


class Machine(RuleBasedStateMachine):
    pair: Pair | None = None

    @initialize(
        architecture=st.sampled_from(models.NAMES),
        shape=st.sampled_from(list(models.SHAPES)),
        plan=PLANS,
        watched=st.booleans(),
    )
    def start(self, architecture: str, shape: str, plan: str, watched: bool) -> None:
        COUNTS["examples"] += 1
        COUNTS[f"plan {plan}"] += 1
        warnings.simplefilter("ignore")
        self.pair = Pair(architecture, plan, 1.0 if watched else 0.0, shape)

    @property
    def both(self) -> Pair:
        assert self.pair is not None
        return self.pair

    @rule(call=ANY)
    def call(self, call: Call) -> None:
        self.both.call(call)

    @rule(call=USUAL)
    def usual_call(self, call: Call) -> None:
        self.both.call(call)

    @rule(call=st.one_of(USUAL, ANY), mode=st.sampled_from(list(MODES)))
    def call_in_a_mode(self, call: Call, mode: str) -> None:
        self.both.call(call, mode)

    @rule(call=st.one_of(USUAL, ANY), failure=FAILURES)
    def call_that_fails(self, call: Call, failure: Failure) -> None:
        self.both.call(call, failure=failure)

    @rule(call=USUAL, failure=FAILURES, plan=PLANS)
    def fresh_plan_fails(self, call: Call, failure: Failure, plan: str) -> None:
        """A plan that fits the model, in its first call."""
        self.both.switch(plan)
        self.both.call(call, failure=failure)

    @rule(call=IN_THREADS, failure=st.one_of(st.none(), FAILURES.filter(lambda f: f.place != "alarm")))
    def calls_in_threads(self, call: Call, failure: Failure | None) -> None:
        self.both.in_threads(call, failure)

    @rule(name=CHANGES, call=st.one_of(USUAL, ANY))
    def change(self, name: str, call: Call) -> None:
        self.both.change(name)
        self.both.call(call)

    @rule(names=st.lists(CHANGES, min_size=2, max_size=3, unique=True), call=USUAL)
    def changes(self, names: list[str], call: Call) -> None:
        for name in names:
            self.both.change(name)
        self.both.call(call)

    @rule(call=USUAL)
    def undo(self, call: Call) -> None:
        self.both.undo()
        self.both.call(call)

    @rule(plan=PLANS, call=ANY)
    def tune_again(self, plan: str, call: Call) -> None:
        self.both.switch(plan)
        self.both.call(call)

    @rule(plan=PLANS)
    def wrap_again(self, plan: str) -> None:
        self.both.rewrap(plan)

    @rule()
    def roll_back(self) -> None:
        self.both.roll_back()

    @rule()
    def commit(self) -> None:
        self.both.commit()

    @rule(pauses=st.integers(1, 4))
    def wait(self, pauses: int) -> None:
        self.both.wait(pauses)

    def teardown(self) -> None:
        if self.pair is not None:
            self.pair.close()


def configured(examples: int, *, random: bool, shrink: bool = True, steps: int = STEPS) -> settings:
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=not random,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
