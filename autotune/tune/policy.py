"""Policies as data: what to optimise for, within which limits, and which transforms to try when.

A policy is a TOML file; the built-in ones are in policies/. Loading checks everything in it, also against the registry
of transforms. So a typing error raises an error that names the file and explains it; otherwise the step would silently
never run.
"""

from __future__ import annotations

import logging
import math
import os
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from .. import transforms
from ..diagnose.diagnosis import Bottleneck
from ..errors import ChoiceError, PolicyError, nearest
from ..machine.cache_dir import expanded
from ..runtime.batching.terms import MOST_WAITING
from ..transforms.continuous_batching import MOST_ROWS
from ..validate.limits import Limits
from ..validate.tiers import TIERS
from ..workload import PHASES, Phase
from . import conditions
from .budget import GrowingBudget
from .conditions import Range

logger = logging.getLogger("autotune")

BUILT_IN = Path(__file__).parent / "policies"
OBJECTIVES = ("latency", "throughput", "memory")
DEVICES = ("cpu", "cuda")
BOTTLENECKS: tuple[str, ...] = get_args(Bottleneck)


@dataclass(frozen=True)
class Choice:
    """One transform a step may try."""

    transform: str
    params: dict[str, Any] = field(default_factory=dict)
    phase: Literal["prefill", "decode", "both"] = "both"


@dataclass(frozen=True)
class PolicyStep:
    """One question: for this bottleneck, which of these choices helps?

    Args:
        name: what the step is about, for reports ("smaller weights").
        phase: the phase whose latency the step must improve.
        bottlenecks: diagnoses for which the step is tried; empty: any.
        devices: device types that the step is for; empty: any.
        capabilities: ranges of GPU compute capabilities that the step is for; empty: any, and CPUs.
        parameters: range of model sizes that the step is for, in parameters; None: any.
        choices: candidates; the tuner orders them by predicted gain and stops when the rest cannot win.
    """

    name: str
    phase: Phase
    choices: tuple[Choice, ...]
    bottlenecks: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()
    capabilities: tuple[Range, ...] = ()
    parameters: Range | None = None


@dataclass(frozen=True)
class Batching:
    """How requests of several callers may be decoded together.

    Args:
        max_batch: most sequences; 1: one caller at a time.
        max_queue: requests that may wait for a place among them; further ones are refused.
        max_wait_ms: how long a request may wait for others while no sequence is under way. A caller who was alone
            before does not wait.
        max_tpot_ms: most milliseconds per token of any caller; fewer are decoded together if that takes longer.
        max_kv_mb: most memory for the keys and values of all sequences, MB.
    """

    max_batch: int = 1
    max_queue: int = MOST_WAITING
    max_wait_ms: float = 0.0
    max_tpot_ms: float = math.inf
    max_kv_mb: float = math.inf


@dataclass(frozen=True)
class Policy:
    """How to tune.

    Args:
        name: "balanced", "latency", "throughput", "memory", "lossless" or a user's own.
        description: one sentence.
        objective: "latency" (end to end of a request), "throughput" (tokens/s over batch sizes) or "memory".
        tier: quality tier, "lossless", "strict", "relaxed" or "aggressive".
        limits: what must not get worse, and by how much.
        budget_s: tuning time in seconds, exactly, or a budget that grows with the model on a GPU.
        steps: the steps, in the order in which they are considered.
        batching: whether and how requests of several callers are decoded together.
        source: the policy's file; empty: it was made in code.

    Raises:
        PolicyError: two steps have the same name, or a choice does not touch the phase of its step.
    """

    name: str
    description: str
    objective: Literal["latency", "throughput", "memory"]
    tier: str
    limits: Limits
    budget_s: float | GrowingBudget
    steps: tuple[PolicyStep, ...]
    batching: Batching = Batching()
    source: str = ""

    def __post_init__(self) -> None:
        where, numbers = self.source or f"policy {self.name!r}", dict[str, int]()
        for number, step in enumerate(self.steps, 1):
            if (first := numbers.setdefault(step.name, number)) != number:  # the search and reports go by the name
                raise PolicyError(
                    f"{where}: steps {first} and {number} are both called {step.name!r}: rename one of them"
                )
            for k, choice in enumerate(step.choices, 1):
                if choice.phase not in ("both", step.phase):
                    raise PolicyError(
                        f"{where}, step {number} ({step.name}), choice {k}: {choice.transform} is applied to "
                        f"{choice.phase}, and the step is to make {step.phase} faster: "
                        f'give it phase = "{step.phase}" or "both"'
                    )

    @classmethod
    def load(cls, name_or_path: str | Path) -> Policy:
        """Load and check a policy by name, or from a .toml file.

        Raises:
            PolicyError: there is no policy of that name, or it is malformed; the message names file, step and nearest
                spelling.
        """
        return load(name_or_path)


def available(extra_dir: str | Path | None = None) -> dict[str, Path]:
    """Policy name -> file: the built-in ones and the user's, which add to them or override them (with a warning).

    Args:
        extra_dir: the user's directory; default $AUTOTUNE_POLICY_DIR.

    Raises:
        PolicyError: the user's directory does not exist.
    """
    found = {path.stem: path for path in sorted(BUILT_IN.glob("*.toml"))}
    extra = extra_dir or os.environ.get("AUTOTUNE_POLICY_DIR")
    if not extra:
        return found
    folder = expanded(extra)
    if not folder.is_dir():
        raise PolicyError(f"the policy directory {folder} does not exist; make it, or unset AUTOTUNE_POLICY_DIR")
    for path in sorted(folder.glob("*.toml")):
        if path.stem in found:
            logger.warning("policy %r: %s overrides %s", path.stem, path, found[path.stem])
        found[path.stem] = path
    return found


def load(name_or_path: str | Path, extra_dir: str | Path | None = None) -> Policy:
    """Load and check a policy by name, or from a .toml file.

    Raises:
        PolicyError: there is no policy of that name, or it is malformed.
    """
    text = str(name_or_path)
    if text.endswith(".toml") or os.sep in text:
        return check(text)
    found = available(extra_dir)
    if text not in found:
        raise PolicyError(f"there is no policy {text!r}{nearest(text, found)}; available: {', '.join(found)}")
    return check(found[text])


def check(path: str | Path) -> Policy:
    """Load and check the policy in a file.

    Raises:
        PolicyError: names the file, the step, what was wrong, what was expected and the nearest spelling.
    """
    path = expanded(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # tomllib's and UTF-8's errors are ValueErrors
        raise PolicyError(f"{path}: cannot be read as TOML: {error}") from error
    where = str(path)
    _known_keys(table, ("name", "description", "objective", "tier", "budget_s", "batching", "limits", "steps"), where)
    name = _text(table, "name", where)
    if name != path.stem:
        raise PolicyError(
            f"{where}: name is {name!r}; a policy is called as its file, {path.stem!r}: rename one of them"
        )
    steps = table.get("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        raise PolicyError(f"{where}: steps is missing or not a list of tables; expected at least one [[steps]]")
    return Policy(
        name=name,
        description=_text(table, "description", where),
        objective=_one_of(table, "objective", OBJECTIVES, where),  # type: ignore[arg-type]  # checked
        tier=_one_of(table, "tier", TIERS, where),
        limits=_limits(table.get("limits", {}), f"{where}, [limits]"),
        budget_s=_budget(table, where),
        steps=tuple(_step(step, i, where) for i, step in enumerate(steps, 1)),
        batching=_batching(table.get("batching", {}), f"{where}, [batching]"),
        source=where,
    )


def _budget(table: Mapping[str, Any], where: str) -> float | GrowingBudget:
    if not isinstance(given := table.get("budget_s"), dict):
        return _number(table, "budget_s", where)
    names, where = [f.name for f in fields(GrowingBudget)], f"{where}, budget_s"
    _known_keys(given, names, where)
    return GrowingBudget(**{name: _number(given, name, where) for name in names})


def _batching(table: Any, where: str) -> Batching:
    if not isinstance(table, dict):
        raise PolicyError(f"{where}: expected a table, found {table!r}")
    _known_keys(table, [f.name for f in fields(Batching)], where)
    most = {"max_batch": MOST_ROWS, "max_queue": math.inf}
    given = {key: _whole(table, key, most[key], where) if key in most else _number(table, key, where) for key in table}
    return Batching(**given)  # type: ignore[arg-type]  # checked


def _limits(table: Any, where: str) -> Limits:
    if not isinstance(table, dict):
        raise PolicyError(f"{where}: expected a table, found {table!r}")
    _known_keys(table, [f.name for f in fields(Limits)], where)
    return Limits(**{key: _number(table, key, where) for key in table})


def _step(table: Mapping[str, Any], number: int, where: str) -> PolicyStep:
    where = f"{where}, step {number}"
    name = _text(table, "name", where)
    where = f"{where} ({name})"
    _known_keys(table, ("name", "when", "choices"), where)
    when = table.get("when")
    if not isinstance(when, dict):
        raise PolicyError(f'{where}: when is missing or not a table; expected when = {{ phase = "decode", ... }}')
    _known_keys(when, ("phase", "bottleneck", "device", "capability", "parameters"), f"{where}, when")
    choices = table.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise PolicyError(f'{where}: choices is missing or empty; expected choices = [{{ transform = "..." }}, ...]')
    return PolicyStep(
        name=name,
        phase=_one_of(when, "phase", PHASES, f"{where}, when"),  # type: ignore[arg-type]  # checked
        choices=tuple(_choice(choice, f"{where}, choice {i}") for i, choice in enumerate(choices, 1)),
        bottlenecks=_several_of(when, "bottleneck", BOTTLENECKS, f"{where}, when"),
        devices=_several_of(when, "device", DEVICES, f"{where}, when"),
        capabilities=_capabilities(when, f"{where}, when"),
        parameters=_parameters(when, f"{where}, when"),
    )


def _capabilities(when: Mapping[str, Any], where: str) -> tuple[Range, ...]:
    values = when.get("capability", [])
    if not isinstance(values, list):
        raise PolicyError(f'{where}: capability is {values!r}; expected a list, capability = ["hopper"]')
    if values and "cpu" in when.get("device", ["cuda"]):
        raise PolicyError(f'{where}: a capability is a GPU\'s; expected device = ["cuda"] alone beside it')
    return tuple(_range({"capability": value}, "capability", conditions.of_capabilities, where) for value in values)


def _parameters(when: Mapping[str, Any], where: str) -> Range | None:
    return _range(when, "parameters", conditions.of_numbers, where) if "parameters" in when else None


def _range(table: Mapping[str, Any], key: str, parse: Callable[[str], Range], where: str) -> Range:
    try:
        return parse(_text(table, key, where))
    except ValueError as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"{where}: {key}: {error}") from error


def _choice(table: Mapping[str, Any], where: str) -> Choice:
    name, phase = _text(table, "transform", where), table.get("phase", "both")
    params = {key: value for key, value in table.items() if key not in ("transform", "phase")}
    try:
        transforms.make(name, params, phase)
    except ChoiceError as error:
        raise PolicyError(f"{where}: {error}") from error
    return Choice(name, params, phase)


def _known_keys(table: Iterable[str], known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise PolicyError(f"{where}: unknown key {key!r}{nearest(key, known)}; known: {', '.join(known)}")


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value.strip():
        raise PolicyError(f"{where}: {key} is {'missing' if value is None else repr(value)}; expected text")
    return value


def _number(table: Mapping[str, Any], key: str, where: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise PolicyError(
            f"{where}: {key} is {'missing' if value is None else repr(value)}; expected a number, 0 or more"
        )
    return float(value)


def _whole(table: Mapping[str, Any], key: str, most: float, where: str) -> int:
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        wanted = "1 or more" if most == math.inf else f"from 1 to {most}"
        raise PolicyError(f"{where}: {key} is {value!r}; expected a whole number, {wanted}")
    return value


def _one_of(table: Mapping[str, Any], key: str, known: Collection[str], where: str) -> str:
    value = _text(table, key, where)
    if value not in known:
        raise PolicyError(f"{where}: unknown {key} {value!r}{nearest(value, known)}; known: {', '.join(known)}")
    return value


def _several_of(table: Mapping[str, Any], key: str, known: Collection[str], where: str) -> frozenset[str]:
    values = table.get(key, [])
    if not isinstance(values, list):
        raise PolicyError(f"{where}: {key} is {values!r}; expected a list, {key} = [{next(iter(known))!r}]")
    return frozenset(_one_of({key: value}, key, known, where) for value in values)
