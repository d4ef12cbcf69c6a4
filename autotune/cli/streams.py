"""Standard output and standard error of a command. A closed pipe or a full disk must not crash the command.

If a reader closes the pipe (`| head`), the command goes on and keeps its exit code. Any other write error is reported,
and turns exit code 0 into 3.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from ..report.exit_codes import Code
from ..report.printable import printable


class Stream:
    """A text stream that records the first write error instead of raising it. All else goes to the wrapped stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def code(self, code: int) -> int:
        """Flush, and return the exit code that includes a write error.

        Args:
            code: exit code of the command.
        """
        self.flush()
        if self.failure is None or self.failure.errno == errno.EPIPE:
            return code
        sys.stderr.write(f"autotune: standard output cannot be written: {self.failure.strerror}\n")
        return Code.UNMEASURED if code == Code.DONE else code

    def _try(self, act: Any) -> None:
        if self.failure is not None:
            return
        try:
            act()
        except OSError as error:
            self.failure = error
            self._divert()

    def _divert(self) -> None:
        """Redirect the stream to the null device, because buffered text would fail again when the process ends."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Notes(logging.Handler):
    """Prints the library's warnings, one per line."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"autotune: {printable(' '.join(record.getMessage().split()))}\n")


@contextmanager
def guarded() -> Iterator[Stream]:
    """Replace the standard streams, and the format of warnings, while the block runs. Yields standard output."""
    before: tuple[Any, Any, Any] = sys.stdout, sys.stderr, warnings.formatwarning
    with open(os.devnull, "w") as nowhere:
        out, errors = (Stream(stream or nowhere) for stream in before[:2])  # None if it was closed
        sys.stdout = out
        sys.stderr = errors
        warnings.formatwarning = lambda message, *_, **__: f"{printable(message)}\n"
        notes, log = _Notes(logging.WARNING), logging.getLogger("autotune")
        log.addHandler(notes)
        try:
            with _anything_encodes(out), _anything_encodes(errors):
                yield out
        finally:
            log.removeHandler(notes)
            sys.stdout, sys.stderr, warnings.formatwarning = before


@contextmanager
def _anything_encodes(stream: Stream) -> Iterator[None]:
    """Print characters that the terminal's encoding lacks as their numbers."""
    strict = getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure")
    if strict:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.flush()
        if strict and stream.failure is None:
            stream.reconfigure(errors="strict")
