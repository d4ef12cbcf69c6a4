"""Processes that would find the same plan: one searches, the others wait for it."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.runtime.traffic import Traffic
from autotune.transforms.lean_loop import LeanLoop
from autotune.tune import search_lock, store
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.plan import Plan

SAME = Fingerprint("model", "here", {"torch": "2"}, "work", "policy", "strict")
PLAN = Plan(SAME, (LeanLoop(),))
HOLD = """
import sys, time
from autotune.tune import search_lock
from autotune.tune.fingerprint import Fingerprint

with search_lock.turn(Fingerprint("model", "here", {"torch": "2"}, "work", "policy", "strict")) as mine:
    print(mine.take(), flush=True)
    sys.stdin.read()
"""


@contextmanager
def another() -> Iterator[subprocess.Popen[str]]:
    """Another process that searches until it is ended."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD], cwd=Path(__file__).parents[2], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def impatient(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_lock, "ASK_EVERY_S", 0.02)


def waiting(rest: Any = None, most_s: float = 60.0, refused: Plan | None = None) -> tuple[Plan | None, list[str]]:
    said = list[str]()
    with search_lock.turn(SAME) as mine:
        return search_lock.awaited(mine, SAME, most_s, said.append, rest or Traffic().rest, refused), said


def saving(plan: Plan, rests: list[float]) -> Callable[[float], bool]:
    """Rests, of which the third ends when another process has saved its plan."""

    def rest(seconds: float) -> bool:
        rests.append(seconds)
        if len(rests) == 3:
            store.save(plan)
        return False

    return rest


def test_a_process_that_is_alone_searches_at_once() -> None:
    assert waiting() == (None, [])
    assert waiting() == (None, [])  # what was taken was given back


def test_others_wait_for_the_plan() -> None:
    with another():
        rests = list[float]()
        found, said = waiting(saving(PLAN, rests))
    assert found == PLAN
    assert said == ["another process is tuning this model on this machine: waiting for its plan"]
    assert len(rests) == 3


def test_the_plan_that_did_not_hold_is_not_what_others_wait_for() -> None:
    stale, fresh = replace(PLAN, created="2026-11-01"), replace(PLAN, created="2026-11-30")
    store.save(stale)
    with another():
        rests = list[float]()
        assert waiting(saving(fresh, rests), refused=stale)[0] == fresh
        assert len(rests) == 3


@pytest.mark.parametrize("spoil", ["doubted", "written by others", "in the way"])
def test_who_waits_is_warned_once_of_a_plan_that_is_not_used(spoil: str, caplog: pytest.LogCaptureFixture) -> None:
    path = store.save(PLAN)
    assert path is not None
    if spoil == "doubted":
        store.trust(SAME, "it drifted")
    elif spoil == "written by others":
        path.chmod(0o620)
    else:
        path.write_bytes(b"garbage")
        path.with_name(f"{path.name}.refused").mkdir()  # so it cannot be set aside
    with another():
        rests = list[float]()
        assert waiting(saving(PLAN, rests))[0] == PLAN
        assert len(rests) == 3
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_a_process_that_dies_leaves_its_turn_to_the_next() -> None:
    with another() as process:
        timer = threading.Timer(0.3, process.kill)
        timer.start()
        assert waiting()[0] is None
        timer.join()
        assert process.wait(10) != 0


def test_another_model_does_not_wait() -> None:
    with another(), search_lock.turn(Fingerprint("other", "", {}, "", "", "strict")) as mine:
        assert mine.take()


def test_who_waits_too_long_goes_on_and_who_is_called_off_ends() -> None:
    with another():
        found, said = waiting(lambda seconds: False, most_s=0.0)
        assert (found, said[-1]) == (None, "the other process has been tuning for 0 s: tuning beside it")
        assert waiting(lambda seconds: True) == (None, said[:1])


@pytest.mark.parametrize("fingerprint", [None, SAME])
def test_without_a_cache_to_share_nobody_waits(
    fingerprint: Fingerprint | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "path_for", lambda _: None)
    with another(), search_lock.turn(fingerprint) as mine:
        assert mine.take()
