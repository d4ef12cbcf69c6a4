"""The engine and the callers who need the model alone have it in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from autotune.machine.ending import Cancelled
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

    def later(is_true: Callable[[], object]) -> None:
        """Wait as `wait_for` does, and look only once the caller has looked and waits again."""
        while not is_true():
            changed.wait()
            changed.wait(0.3)

    with turns.alone():
        calling = start(caller)
        until(lambda: turns._borrowers)
        monkeypatch.setattr(changed, "wait_for", later)
        working = start(engine)
        until(lambda: turns._is_wanted)
        stopped.set()
    working.join(WAIT_S)
    calling.join(WAIT_S)
    assert over.is_set()
