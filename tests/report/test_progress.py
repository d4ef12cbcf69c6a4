"""Progress on a scripted clock: what is said, where, and how often."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from autotune.report.progress import Doing, Elapsed, Lines, Live, shown


class Ticking:
    """A clock that is told what time it is."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("budget_s", "elapsed_s", "expected"),
    [
        (300.0, 42.9, "[42 s / 5 min] trying"),
        (None, 3.0, "[3 s] trying"),
        (90.0, 0.0, "[0 s / 1 min 30 s] trying"),
        (60.0, 75.0, "[1 min 15 s / 1 min] trying"),
    ],
)
def test_a_line_has_step_elapsed_time_and_budget(budget_s, elapsed_s, expected):
    clock, out = Ticking(), io.StringIO()
    lines = Lines(out, Elapsed(budget_s, clock))
    clock.now += elapsed_s
    lines.update("trying")
    assert out.getvalue() == expected + "\n"


def test_a_step_is_announced_once():
    out = io.StringIO()
    lines = Lines(out, Elapsed(None, Ticking()))
    for step in ("profiling", "profiling", "trying", "profiling"):
        lines.update(step)
    assert [line.split("] ")[1] for line in out.getvalue().splitlines()] == ["profiling", "trying", "profiling"]


def test_a_long_step_says_now_and_then_how_much_is_done():
    clock, out = Ticking(), io.StringIO()
    lines = Lines(out, Elapsed(None, clock))
    for second, share in enumerate((0.0, 0.1, 0.2, 0.3, 0.4, 0.55, 0.6)):
        clock.now = 100.0 + second
        lines.update(Doing("judging", share))
    assert out.getvalue() == "[0 s] judging\n[5 s] judging: 55 %\n"


def test_on_a_terminal_the_present_step_shows_the_share():
    out = io.StringIO()
    console = Console(file=out, width=80)
    live = Live(console, Elapsed(60.0, Ticking()))
    live.update("profiling")
    for share in (0.1, 0.5):
        live.update(Doing("judging", share))
    console.print(live)
    assert "[0 s / 1 min] judging: 50 %" in out.getvalue()
    live.finish()
    assert out.getvalue().endswith("[0 s / 1 min] judging\n")


def test_on_a_terminal_finished_steps_stay_and_the_present_one_shows_its_time():
    clock, out = Ticking(), io.StringIO()
    console = Console(file=out, width=80)
    live = Live(console, Elapsed(60.0, clock))
    live.update("profiling")
    clock.now += 5
    live.update("trying int8[x]")
    assert out.getvalue() == "[0 s / 1 min] profiling\n"
    clock.now += 2
    console.print(live)
    assert "[7 s / 1 min] trying int8[x]" in out.getvalue()
    live.finish()
    assert out.getvalue().endswith("[5 s / 1 min] trying int8[x]\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_shown_chooses_by_the_stream(terminal):
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    out = Stream()
    with shown(10.0, out) as progress:
        progress.update("measuring")
    assert isinstance(progress, Live if terminal else Lines)
    assert "/ 10 s] measuring" in out.getvalue()
