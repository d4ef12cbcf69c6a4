"""Exceptions raised in our code from outside: by a signal handler or by another thread.

A user's alarm or a library's timeout may go off while a candidate is measured or a plan serves a call. It says nothing
about the candidate or the plan: the user's own call ends, as it would without autotune.
"""

from __future__ import annotations

import dis
import queue
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType

RAISES = frozenset(dis.opmap[name] for name in ("RAISE_VARARGS", "RERAISE"))
WORDLESS = (MemoryError, StopIteration, StopAsyncIteration, queue.Empty)  # functions in C raise these without a message


def delivered(error: BaseException, depth: int = 1) -> BaseException | None:
    """Return the exception that came from outside, if `error` is one or was caused by one, else None.

    Args:
        error: the caught exception.
        depth: calls from the function that caught it to this one. Exceptions that its callers handle do not count.
    """
    callers = set(_callers(sys._getframe(depth)))
    for each in _chain(error):
        trace = each.__traceback__
        if trace is not None and trace.tb_frame in callers:
            return None
        if trace is not None and _from_outside(each, trace):
            return each
    return None


def pass_on(error: BaseException) -> None:
    """Raise the exception that came from outside, if that caused `error`. Call this first in an `except` block."""
    if (theirs := delivered(error, depth=2)) is not None:
        raise theirs


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _callers(frame: FrameType) -> Iterator[FrameType]:
    while (caller := frame.f_back) is not None:
        yield caller
        frame = caller


def _from_outside(error: BaseException, trace: TracebackType) -> bool:
    """Whether a signal handler or another thread raised `error`.

    A signal handler receives the frame that it interrupts, and that frame calls it. An exception from another thread
    (`PyThreadState_SetAsyncExc`) has no message, and appears at an instruction that does not raise.
    """
    while (inner := trace.tb_next) is not None:
        interrupted, trace = trace.tb_frame, inner
        values = list(trace.tb_frame.f_locals.values())
        values += [each for value in values if isinstance(value, tuple) for each in value]  # handler(*args)
        if any(v is interrupted for v in values) and any(isinstance(v, int) for v in values):  # (number, frame)
            return True
    wordless = not error.args and not isinstance(error, WORDLESS)
    return wordless and trace.tb_frame.f_code.co_code[trace.tb_lasti] not in RAISES
