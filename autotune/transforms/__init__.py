"""The contract of a transform, and the one door through which all of them come.

A transform is a frozen dataclass whose fields are its parameters. It edits a `Variant`, never the original, and never
writes into a tensor it did not create: tensors are shared with the original. Built-ins (the modules of this package)
and third parties (entry-point group `autotune.transforms`) are found by `registry()` alike.
"""

from __future__ import annotations

import difflib
import enum
import functools
import importlib
import inspect
import logging
import pkgutil
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeGuard

from ..errors import ChoiceError

if TYPE_CHECKING:
    from ..machine.hardware import Hardware
    from ..profile import Profile
    from ..runtime.variant import Variant
    from ..workload import Phase

GROUP = "autotune.transforms"  # the entry-point group of third parties
log = logging.getLogger("autotune")


class Blocker(str):
    """A reason of `Transform.unavailable` that the user can and may want to put right.

    A plain reason lies in the model, the machine or the packages that are installed: nothing is wrong. A blocker keeps
    away what should work here: a compiler is missing or failed, or autotune does not know how a model is called.
    A search does not pass over it in silence.
    """

    __slots__ = ()


class Stage(enum.IntEnum):
    """Order in which the transforms of a plan are applied; it replaces pairwise compatibility lists."""

    WEIGHTS = 1
    ATTENTION = 2
    LAYERS = 3
    CACHE = 4
    LOOP = 5
    COMPILE = 6
    GRAPH = 7
    THREADS = 8
    SPECULATION = 9


@dataclass(frozen=True)
class Transform:
    """One optimisation.

    Args:
        phase: which phase's module it edits: "prefill", "decode" or "both".
    """

    phase: Literal["prefill", "decode", "both"] = "both"

    name: ClassVar[str]
    stage: ClassVar[Stage]
    summary: ClassVar[str]  # one line for `autotune transforms`
    foreign: ClassVar[bool] = False  # runs a compiler's or another library's kernels; see `is_foreign`
    lossless: ClassVar[bool] = False  # judged at the lossless tier whatever the policy's tier is

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        """Why it cannot be tried on this variant and machine, or None; a `Blocker` where it should work there.

        Cheap; raises nothing.
        """
        return None

    def rehearsed(self) -> Transform | None:
        """What is tried on a tiny model of the user's class before this is tried on the user's, or None.

        That shows whether an architecture bears it at all; see `autotune.tune.rehearsal`. It has to be quick.
        """
        return None

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best-case speed-up per phase it touches, from the roofline: {"decode": 2.1}."""
        raise NotImplementedError

    def extra_bytes(self, variant: Variant) -> float:
        """Memory it takes beside what the variant holds already; more than is free is not tried."""
        return 0.0

    def apply(self, variant: Variant) -> None:
        """Edit the variant. Raises TransformError where it cannot after all; anything else counts as a crash.

        What `unavailable` can see it should say: a refusal here counts as blocked.
        """
        raise NotImplementedError

    def took_effect(self, variant: Variant) -> str | None:
        """None when the variant really changed (modules replaced, graph captured, kernel used), or what is missing."""
        raise NotImplementedError

    @property
    def phases(self) -> tuple[Phase, ...]:
        return ("prefill", "decode") if self.phase == "both" else (self.phase,)

    @property
    def params(self) -> dict[str, Any]:
        """Parameters other than the phase, JSON-ready."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "phase"}

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.params.items() if v != "")
        return f"{self.name}({inner})@{self.phase}" if inner else f"{self.name}@{self.phase}"


def is_foreign(transform: Transform) -> bool:
    """Whether a transform runs native code that neither torch nor autotune has: it may end the process or never return.

    That of a plug-in is taken to.
    """
    return transform.foreign or not type(transform).__module__.startswith("autotune.")


@functools.cache
def registry() -> Mapping[str, type[Transform]]:
    """Every transform by name: the built-ins, then third parties', which may override a built-in (with a warning).

    A plug-in that cannot be imported or is no transform is left out with a warning that names it.
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
    """A transform by name.

    Args:
        name: a name in `registry()`.
        params: its parameters; those left out keep their defaults.
        phase: "prefill", "decode" or "both".

    Raises:
        ChoiceError: no such transform, parameter, phase or value; the message names the nearest spelling.
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
        ChoiceError: it is not; the message names the nearest spelling.
    """
    options = list(allowed)
    if value not in options:
        raise ChoiceError(f"{what} is {value!r}{_nearest(value, options)}")


def _check(what: str, value: Any, expected: type) -> None:
    """A value has the type of the parameter's default, where that is a simple one; an int will do for a float."""
    fits = type(value) is expected or (expected is float and type(value) is int)
    if expected in (int, float, str, bool) and not fits:
        raise ChoiceError(f"{what} must be {expected.__name__}, not {value!r}")


def _nearest(given: object, options: Iterable[object]) -> str:
    names = sorted(map(str, options))
    close = difflib.get_close_matches(str(given), names, n=1)
    known = "it takes none" if not names else f"expected one of {', '.join(names)}"
    return f"; did you mean {close[0]!r}?" if close else f"; {known}"


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
        log.warning("transform plug-in %r (%s) left out: it is no named Transform class", plugin.name, plugin.value)
        return None
    return cls


def _is_transform(cls: object) -> TypeGuard[type[Transform]]:
    """A class without a name is a part that transforms share."""
    return inspect.isclass(cls) and issubclass(cls, Transform) and hasattr(cls, "name")
