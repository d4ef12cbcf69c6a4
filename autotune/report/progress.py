"""What long work is doing, for people: the step, how much of it is done, the time it has taken, and the budget."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from .numbers import duration
from .printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.spinner import Spinner

Clock = Callable[[], float]
EVERY_S = 5.0  # between two lines about the same step


class Doing(str):
    """A step in words, with how much of it is done: what a `progress` callback is given while something goes on.

    Attributes:
        share: from 0 to 1.
    """

    __slots__ = ("share",)
    share: float

    def __new__(cls, step: str, share: float) -> Doing:
        self = super().__new__(cls, step)
        self.share = share
        return self


def said(step: str) -> str:
    """A step on one line, with the share done where it is known."""
    return f"{step}: {step.share * 100:.0f} %" if isinstance(step, Doing) else step


class Progress(Protocol):
    """Where steps are announced. Its `update` is what the library takes as `progress`."""

    def update(self, step: str) -> None:
        """A new step begins, or goes on.

        Args:
            step: what is being done, in a phrase; a `Doing` says how much of it is done.
        """


class Elapsed:
    """Elapsed time against a budget.

    Args:
        budget_s: seconds; None where nobody set any.
    """

    def __init__(self, budget_s: float | None = None, clock: Clock = time.monotonic) -> None:
        self._clock, self._start, self._budget_s = clock, clock(), budget_s

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start

    def __str__(self) -> str:
        spent = duration(float(int(self.elapsed_s)))
        return f"{spent} / {duration(self._budget_s)}" if self._budget_s is not None else spent


class Lines:
    """A line a step: "[42 s / 5 min] trying weight_only(bits=8, group=32)@decode"."""

    def __init__(self, stream: TextIO, watch: Elapsed) -> None:
        self._stream, self._watch, self._last, self._told_s = stream, watch, "", 0.0

    def update(self, step: str) -> None:
        new, now_s = step != self._last, self._watch.elapsed_s
        if not new and not (isinstance(step, Doing) and now_s >= self._told_s + EVERY_S):
            return
        self._last, self._told_s = step, now_s
        self._stream.write(f"[{self._watch}] {printable(step if new else said(step))}\n")
        self._stream.flush()


class Live:
    """The same on a terminal: finished steps scroll away, the present one shows its time running."""

    def __init__(self, console: Console, watch: Elapsed) -> None:
        from rich.spinner import Spinner

        self._console, self._watch = console, watch
        self._spinner = Spinner("dots")
        self._began, self._step, self._said = "", "", ""

    def update(self, step: str) -> None:
        if step != self._step:
            self.finish()
            self._began, self._step = str(self._watch), step
        self._said = said(step)

    def finish(self) -> None:
        """The present step is done: leave its line behind."""
        from rich.text import Text

        if self._step:
            self._console.print(Text(f"[{self._began}] {printable(self._step)}", style="dim"))
            self._step = ""

    def __rich__(self) -> Spinner:  # drawn anew several times a second
        from rich.text import Text

        self._spinner.update(text=Text(f"[{self._watch}] {printable(self._said)}"))
        return self._spinner


@contextmanager
def shown(budget_s: float | None = None, stream: TextIO | None = None) -> Iterator[Progress]:
    """Progress on `stream` (standard error) while the block runs: drawn on a terminal, plain lines elsewhere."""
    stream = stream or sys.stderr
    watch = Elapsed(budget_s)
    if not stream.isatty():
        yield Lines(stream, watch)
        return
    from rich import live
    from rich.console import Console

    console = Console(file=stream)
    progress = Live(console, watch)
    with live.Live(progress, console=console, refresh_per_second=8, transient=True):
        yield progress
        progress.finish()
