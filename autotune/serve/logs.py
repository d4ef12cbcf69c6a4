"""The server's log: a JSON object a line, with the id of the request that it is about."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
log = logging.getLogger("autotune.serve")


@dataclass(frozen=True)
class RequestContext:
    """The request that a task serves.

    Args:
        id: its own, or the one that it came with.
        arrived_s: when it arrived, monotonic seconds.
    """

    id: str
    arrived_s: float


CURRENT: ContextVar[RequestContext | None] = ContextVar("autotune_request", default=None)


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON: time, level, message, the request's id, `event`'s fields, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        request = CURRENT.get()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage().strip(),
        }
        if request is not None:
            line["id"] = request.id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def event(message: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log something with fields that programs read."""
    log.log(level, message, extra={"fields": fields})


class Steps(io.StringIO):
    """A stream whose lines are logged as steps of tuning."""

    def write(self, text: str) -> int:
        if step := text.strip():
            event("tuning", step=step)
        return len(text)


def install(level: str, logger: str = "") -> Callable[[], None]:
    """Write the log to standard error as lines of JSON from now on. Returns what undoes it.

    Args:
        level: one of `LEVELS`; the least that the server itself logs. Others log warnings.
        logger: whose records are written; default those of all libraries, with warnings and what threads raise.
    """
    target, package, threads = logging.getLogger(logger), logging.getLogger("autotune"), threading.excepthook
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    before = target.handlers[:], target.propagate, package.handlers[:], log.level
    package.handlers = []  # the command line's own, which writes plain lines
    target.addHandler(handler)
    target.propagate = False
    log.setLevel(level.upper())
    if not logger:
        logging.captureWarnings(True)
        threading.excepthook = _log_thread

    def undo() -> None:
        package.handlers = before[2]
        target.handlers, target.propagate = before[:2]
        log.setLevel(before[3])
        if not logger:
            logging.captureWarnings(False)
            threading.excepthook = threads

    return undo


def _log_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread is not None else "unknown"
    value = args.exc_value or args.exc_type()
    log.error("the thread %s failed", name, exc_info=(args.exc_type, value, args.exc_traceback))
