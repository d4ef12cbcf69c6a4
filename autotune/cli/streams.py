"""Standard output and standard error of a command: that nobody reads them, or the disk is full, is no crash.

A reader that closes the pipe (`| head`) has seen enough: the command goes on and its exit code stands. Output that
could not be written otherwise is said, and turns 0 into 3.
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
    """A text stream that remembers that it could not be written to, and lets everything else pass."""

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
        """The exit code, once it is known whether all was written."""
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
        """What is still buffered would fail again when the process ends."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Notes(logging.Handler):
    """Warnings of the library, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"autotune: {printable(' '.join(record.getMessage().split()))}\n")


@contextmanager
def guarded() -> Iterator[Stream]:
    """Replace the standard streams, and how warnings are shown on them, while the block runs; give standard output."""
    before: tuple[Any, Any, Any] = sys.stdout, sys.stderr, warnings.formatwarning
    with open(os.devnull, "w") as nowhere:
        out, errors = (Stream(stream or nowhere) for stream in before[:2])  # None: it was closed
        sys.stdout, sys.stderr = out, errors
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
    """A character that the terminal's encoding lacks is shown as its number."""
    strict = getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure")
    if strict:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.flush()
        if strict and stream.failure is None:
            stream.reconfigure(errors="strict")
