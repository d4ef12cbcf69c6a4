"""The engine and the callers who need the model alone have it in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from autotune.errors import RequestError
from autotune.machine.ending import Cancelled
from autotune.runtime.batching.terms import CURRENT, RequestTerms
from autotune.runtime.batching.turns import ModelTurns
from tests.serve.servers import until

WAIT_S = 20.0  # a deadlock shows as a failure, not as a hang
CALLERS = 4


def start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_where_both_wait_they_have_it_in_alternation() -> None:
    changed, had = threading.Condition(), list[str]()
    turns = ModelTurns(changed)

    def caller() -> None:
        with turns.alone():
            until(lambda: turns._is_wanted or had.count("engine") == CALLERS)
            had.append("caller")

    def engine() -> None:
        for _ in range(CALLERS):
            with changed:
                turns.begin(lambda: False)
            until(lambda: turns._borrowers == CALLERS - had.count("caller"))
            had.append("engine")
            turns.end()

    with turns.alone():
        callers = [start(caller) for _ in range(CALLERS)]
        until(lambda: turns._borrowers == CALLERS)
        working = start(engine)
        until(lambda: turns._is_wanted)
    for thread in (*callers, working):
        thread.join(WAIT_S)
    assert had == ["engine", "caller"] * CALLERS


def test_a_caller_does_not_wait_for_an_engine_that_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the caller, woken first, sees that it is the engine's turn."""
    changed, stopped, over = threading.Condition(), threading.Event(), threading.Event()
    turns = ModelTurns(changed)

    def caller() -> None:
        with turns.alone():
            over.set()

    def engine() -> None:
        with changed, pytest.raises(Cancelled):
            turns.begin(stopped.is_set)

    wait = changed.wait

    def later(timeout: float | None = None) -> bool:
        """Wait, and let the engine look only once the caller has looked and waits again."""
        woken = wait(timeout)
        return wait(0.3) or woken if threading.current_thread() is not calling else woken

    with turns.alone():
        calling = start(caller)
        until(lambda: turns._borrowers)
        monkeypatch.setattr(changed, "wait", later)
        working = start(engine)
        until(lambda: turns._is_wanted)
        stopped.set()
    working.join(WAIT_S)
    calling.join(WAIT_S)
    assert over.is_set()


@pytest.mark.parametrize(
    "terms", [RequestTerms(deadline_s=0.0), RequestTerms(cancelled=True)], ids=["late", "cancelled"]
)
def test_a_request_whose_terms_are_violated_waits_for_no_turn(terms: RequestTerms) -> None:
    changed, refused = threading.Condition(), list[RequestError]()
    turns = ModelTurns(changed)

    def caller() -> None:
        CURRENT.set(terms)
        try:
            with turns.alone():
                pass
        except RequestError as error:
            refused.append(error)

    with turns.alone():
        calling = start(caller)
        calling.join(WAIT_S)
        assert refused
    with turns.alone():  # nobody has it
        pass


def test_while_the_engine_waits_it_looks_at_who_waits_for_it() -> None:
    changed, looked = threading.Condition(), threading.Event()
    turns = ModelTurns(changed)

    def engine() -> None:
        with changed:
            turns.begin(lambda: False, looked.set)
        turns.end()

    with turns.alone():
        working = start(engine)
        assert looked.wait(WAIT_S)
    working.join(WAIT_S)
    assert not working.is_alive()
