"""Show the progress of long work: the step, the share of it that is done, the elapsed time, and the budget."""

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
EVERY_S = 5.0  # least seconds between two lines about the same step


class Doing(str):
    """A step in words with the share of it that is done; passed to a `progress` callback while the step runs.

    Attributes:
        share: share that is done, from 0 to 1.
    """

    __slots__ = ("share",)
    share: float

    def __new__(cls, step: str, share: float) -> Doing:
        self = super().__new__(cls, step)
        self.share = share
        return self


def said(step: str) -> str:
    """Return a step as one line, with the share done if it is known."""
    return f"{step}: {step.share * 100:.0f} %" if isinstance(step, Doing) else step


class Progress(Protocol):
    """Shows steps. Its `update` method is passed to the library as `progress`."""

    def update(self, step: str) -> None:
        """Show that a new step begins, or that the present one goes on.

        Args:
            step: the step in a phrase; a `Doing` also says how much of it is done.
        """


class Elapsed:
    """Elapsed time against a budget.

    Args:
        budget_s: budget in seconds; None if there is none.
    """

    def __init__(self, budget_s: float | None = None, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._budget_s = budget_s

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start

    def __str__(self) -> str:
        spent = duration(float(int(self.elapsed_s)))
        return f"{spent} / {duration(self._budget_s)}" if self._budget_s is not None else spent


class Lines:
    """Writes one line per step: "[42 s / 5 min] trying weight_only(bits=8, group=32)@decode"."""

    def __init__(self, stream: TextIO, watch: Elapsed) -> None:
        self._stream = stream
        self._watch = watch
        self._last = ""
        self._told_s = 0.0

    def update(self, step: str) -> None:
        new, now_s = step != self._last, self._watch.elapsed_s
        if not new and not (isinstance(step, Doing) and now_s >= self._told_s + EVERY_S):
            return
        self._last = step
        self._told_s = now_s
        self._stream.write(f"[{self._watch}] {printable(step if new else said(step))}\n")
        self._stream.flush()


class Live:
    """Draws steps on a terminal: finished steps scroll up, the present one shows its elapsed time."""

    def __init__(self, console: Console, watch: Elapsed) -> None:
        from rich.spinner import Spinner

        self._console = console
        self._watch = watch
        self._spinner = Spinner("dots")
        self._began = ""
        self._step = ""
        self._said = ""

    def update(self, step: str) -> None:
        if step != self._step:
            self.finish()
            self._began = str(self._watch)
            self._step = step
        self._said = said(step)

    def finish(self) -> None:
        """Print the line of the present step, which is done."""
        from rich.text import Text

        if self._step:
            self._console.print(Text(f"[{self._began}] {printable(self._step)}", style="dim"))
            self._step = ""

    def __rich__(self) -> Spinner:  # called several times a second
        from rich.text import Text

        self._spinner.update(text=Text(f"[{self._watch}] {printable(self._said)}"))
        return self._spinner


@contextmanager
def shown(budget_s: float | None = None, stream: TextIO | None = None) -> Iterator[Progress]:
    """Show progress on `stream` (standard error) while the block runs: drawn on a terminal, plain lines elsewhere."""
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
