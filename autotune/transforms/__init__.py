"""The contract of a transform, and the registry that finds all of them.

A transform is a frozen dataclass whose fields are its parameters. It edits a `Variant`, never the original. It never
writes into a tensor it did not create, because the variant shares tensors with the original. `registry()` finds
built-ins (the modules of this package) and third parties' transforms (entry-point group `autotune.transforms`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import pkgutil
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeGuard

from ..errors import Blocker, ChoiceError, nearest
from ..runtime.variant import Stage, Transform

__all__ = ["Blocker", "Stage", "Transform", "is_foreign", "make", "registry", "require"]

GROUP = "autotune.transforms"  # the entry-point group of third parties
log = logging.getLogger("autotune")


def is_foreign(transform: Transform) -> bool:
    """Whether a transform runs native code from outside torch and autotune: it may end the process or never return.

    Every plug-in counts as foreign.
    """
    return transform.foreign or not type(transform).__module__.startswith("autotune.")


@functools.cache
def registry() -> Mapping[str, type[Transform]]:
    """Every transform by name: the built-ins, then third parties', which may override a built-in (with a warning).

    A plug-in that cannot be imported, or is not a transform, is left out. A warning names it.
    """
    found: dict[str, type[Transform]] = {cls.name: cls for cls in _builtins()}
    for plugin in entry_points(group=GROUP):
        if (cls := _load(plugin)) is None:
            continue
        if (other := found.get(cls.name)) is not None:
            log.warning("transform %r of %s replaces that of %s", cls.name, plugin.value, other.__module__)
        found[cls.name] = cls
    return types.MappingProxyType(dict(sorted(found.items())))


def make(name: str, params: Mapping[str, Any], phase: str = "both") -> Transform:
    """Make a transform by name.

    Args:
        name: a name in `registry()`.
        params: its parameters; a parameter that is left out keeps its default.
        phase: "prefill", "decode" or "both".

    Raises:
        ChoiceError: there is no such transform, parameter, phase or value; the message names the nearest spelling.
    """
    cls = registry().get(name)
    if cls is None:
        raise ChoiceError(f"no transform {name!r}{_nearest(name, registry())}")
    require(phase, ("prefill", "decode", "both"), f"{name}: phase")
    defaults = {f.name: f.default for f in fields(cls) if f.name != "phase"}
    for key, value in params.items():
        if key not in defaults:
            raise ChoiceError(f"{name} has no parameter {key!r}{_nearest(key, defaults)}")
        _check(f"{name}: {key}", value, type(defaults[key]))
    try:
        return cls(phase=phase, **params)  # type: ignore[arg-type]
    except ChoiceError:
        raise
    except (TypeError, ValueError) as error:
        raise ChoiceError(f"{name}: {error}") from error


def require(value: Any, allowed: Iterable[Any], what: str) -> None:
    """Refuse a parameter value that is not one of `allowed`; for `__post_init__`.

    Raises:
        ChoiceError: the value is not allowed; the message names the nearest spelling.
    """
    options = list(allowed)
    if value not in options:
        raise ChoiceError(f"{what} is {value!r}{_nearest(value, options)}")


def _check(what: str, value: Any, expected: type) -> None:
    """Check that a value has the type of the parameter's default, if that type is simple. A float may be an int."""
    fits = type(value) is expected or (expected is float and type(value) is int)
    if expected in (int, float, str, bool) and not fits:
        raise ChoiceError(f"{what} must be {expected.__name__}, not {value!r}")


def _nearest(given: object, options: Iterable[object]) -> str:
    names = sorted(map(str, options))
    known = "it takes none" if not names else f"expected one of {', '.join(names)}"
    return nearest(str(given), names) or f"; {known}"


def _builtins() -> Iterator[type[Transform]]:
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for cls in vars(module).values():
            if _is_transform(cls) and cls.__module__ == module.__name__:
                yield cls


def _load(plugin: EntryPoint) -> type[Transform] | None:
    try:
        cls = plugin.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("transform plug-in %r (%s) left out: %s", plugin.name, plugin.value, reason)
        return None
    if not _is_transform(cls):
        log.warning(
            "transform plug-in %r (%s) left out: it is not a Transform class with a name", plugin.name, plugin.value
        )
        return None
    return cls


def _is_transform(cls: object) -> TypeGuard[type[Transform]]:
    """Whether an object is a transform class. A class without a `name` is a base that transforms share."""
    return inspect.isclass(cls) and issubclass(cls, Transform) and hasattr(cls, "name")
