"""Keeps what libraries log while candidates are tried out of the user's standard error.

A candidate that fails is recorded with its reason. What a compiler logs on the way is often a traceback of a hundred
lines, and looks as if the user's program had failed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("autotune")

LIBRARIES = ("torch", "torchao", "bitsandbytes", "transformers")

_here = threading.local()


class _Muted(logging.Filter):
    """Lets warnings of other threads pass. Those of a thread in `quiet` go to autotune's log, at level DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        own = record.name.partition(".")[0] not in LIBRARIES  # a handler may be shared with other loggers
        if own or record.levelno >= logging.ERROR or not getattr(_here, "depth", 0):
            return True
        if not hasattr(record, "told"):  # a record passes every handler above its logger
            record.told = True
            log.debug("%s: %s", record.name, record.getMessage())
        return False


_MUTED = _Muted()


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context, no handler of these libraries' loggers shows what this thread logs below level ERROR.

    Handlers of the root logger are the user's own and show what they are set to.
    """
    for handler in _handlers():
        handler.addFilter(_MUTED)
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1


def _handlers() -> Iterator[logging.Handler]:
    if logging.lastResort is not None:  # for loggers that have no handler
        yield logging.lastResort
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.split(".")[0] in LIBRARIES:
            yield from logger.handlers
