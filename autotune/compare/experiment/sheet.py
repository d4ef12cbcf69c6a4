"""Reads an experiment from a TOML file, checks it, and makes an `Experiment`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import transforms
from ...errors import ChoiceError, ExperimentError, nearest
from ...machine.cache_dir import expanded
from ...tune import policy as policies
from ...validate.limits import Limits

if TYPE_CHECKING:
    from . import Experiment
    from .store import Store

KEYS = {
    "name": str,
    "control": str,
    "workload": (str, list),
    "new_tokens": int,
    "batch_sizes": list,
    "tier": str,
    "objective": str,
    "budget_s": (int, float),
    "pairs": int,
    "limits": dict,
    "candidates": dict,
}
MOST_ROWS = 4096  # largest batch size; prompts are repeated to fill a batch
NEEDED = ("control", "workload", "candidates")


@dataclass(frozen=True)
class Sheet:
    """The content of a file.

    Args:
        name: name of the experiment; default: the file's name.
        given: the arguments of `Experiment`.
        timing: `budget_s` and `pairs` for `Experiment.run`, if given.
    """

    name: str
    given: Mapping[str, Any]
    timing: Mapping[str, Any]

    def experiment(self, store: Store | Path | None = None) -> Experiment:
        """Make the experiment. Raises what `Experiment` raises."""
        from . import Experiment

        return Experiment(self.name, **self.given, store=store)


def load(path: str | Path) -> Sheet:
    """Load and check a file. Paths in it are relative to the file.

    Raises:
        ExperimentError: names the file, what was wrong, what was expected and the nearest spelling.
    """
    path = expanded(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # tomllib's and UTF-8's errors are ValueErrors
        raise ExperimentError(f"{path}: cannot be read as TOML: {error}") from error
    _check_keys(table, KEYS, str(path))
    for key in NEEDED:
        if key not in table:
            raise ExperimentError(f"{path}: {key} is missing; expected {', '.join(NEEDED)} at least")
    for key, value in table.items():
        kinds: Any = KEYS[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise ExperimentError(f"{path}: {key} is {value!r}; expected {names}")
    if not 0 < table.get("budget_s", 1) < float("inf") or table.get("pairs", 1) < 1:
        raise ExperimentError(f"{path}: budget_s and pairs must be above 0")
    for size in table.get("batch_sizes", ()):
        if type(size) is not int or not 1 <= size <= MOST_ROWS:
            raise ExperimentError(f"{path}: batch_sizes holds {size!r}; expected whole numbers of 1 to {MOST_ROWS}")
    given: dict[str, Any] = {
        key: table[key] for key in ("new_tokens", "batch_sizes", "tier", "objective") if key in table
    }
    given["control"] = _beside(path, table["control"])
    work = table["workload"]
    given["workload"] = _beside(path, work) if isinstance(work, str) else work
    given["candidates"] = {name: _candidate(path, name, value) for name, value in table["candidates"].items()}
    if "limits" in table:
        given["limits"] = _limits(path, table["limits"])
    return Sheet(table.get("name", path.stem), given, {k: table[k] for k in ("budget_s", "pairs") if k in table})


def _candidate(path: Path, name: str, value: Any) -> Any:
    """Parse a candidate: text, or one or several tables with a transform each."""
    where = f"{path}, candidate {name!r}"
    if isinstance(value, str):
        return value if value in policies.available() else _beside(path, value)
    tables = [value] if isinstance(value, dict) else value
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ExperimentError(
            f'{where} is {value!r}; expected a policy, a path, or [{{ transform = "...", phase = "..." }}]'
        )
    return [_transform(where, table) for table in tables]


def _transform(where: str, table: Mapping[str, Any]) -> transforms.Transform:
    if not isinstance(table.get("transform"), str):
        raise ExperimentError(f'{where}: {dict(table)!r} names no transform; expected {{ transform = "...", ... }}')
    params = {key: value for key, value in table.items() if key not in ("transform", "phase")}
    try:
        return transforms.make(table["transform"], params, table.get("phase", "both"))
    except ChoiceError as error:
        raise ExperimentError(f"{where}: {error}") from error


def _limits(path: Path, table: Mapping[str, Any]) -> Limits:
    _check_keys(table, [f.name for f in fields(Limits)], f"{path}, [limits]")
    for key, value in table.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1 < value < float("inf"):
            raise ExperimentError(f"{path}, [limits]: {key} is {value!r}; expected a number above -1")
    return Limits(**table)


def _check_keys(table: Iterable[str], known: Iterable[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ExperimentError(f"{where}: unknown key {key!r}{nearest(key, known)}; known: {', '.join(known)}")


def _beside(path: Path, text: str) -> str:
    """A path that exists beside the file, or else the unchanged text (a name of a policy, or of a model on the hub)."""
    there = path.parent / expanded(text)
    return str(there) if there.exists() else text
