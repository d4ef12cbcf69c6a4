"""Lists of logits processors or stopping criteria with somebody around them who observes or replaces their calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def relayed(objects: Any, relay: Callable[..., Any], is_transparent: bool) -> Any:
    """Copy a list into one of its class. Calling the copy calls `relay` with the given list and the arguments."""
    cls: Any = type(objects)
    found = (cls if hasattr(cls, "relay") else _relaying(cls))(objects)
    found.relay, found.is_transparent, found.told = relay, is_transparent, None
    found.objects = objects
    return found


def observed(objects: Any) -> Any:
    """A list without those around it that only observe its calls."""
    while getattr(objects, "is_transparent", False):
        objects = objects.objects
    return objects


def innermost(objects: Any) -> Any:
    """A list as it came with the call."""
    while hasattr(objects, "objects"):
        objects = objects.objects
    return objects


@functools.cache
def _relaying(cls: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.relay(self.objects, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "relay": None, "__module__": cls.__module__})
