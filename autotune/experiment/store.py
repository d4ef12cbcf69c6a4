"""Experiments on disk, in SQLite: what was observed, what was concluded, and what happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Version:
    """One version of an experiment: the same name with other arms or settings is another.

    Args:
        id: its key.
        name: of the experiment.
        number: 1, 2, ...
        mode: "offline", "shadow" or "split".
        status: "running", "done" or "rolled back".
        resumed: whether its earlier observations count.
        started: ISO 8601, UTC.
    """

    id: int
    name: str
    number: int
    mode: str
    status: str
    resumed: bool
    started: str


@dataclass(frozen=True)
class Observation:
    """One measurement of one arm.

    Args:
        arm: its name.
        kind: "latency", "quality", "memory", "shadow", "split", ...
        bucket: of the workload; empty where it does not apply.
        turn: number of the pair or request; with arm, kind and bucket it is the key.
        body: plain JSON values.
    """

    arm: str
    kind: str
    bucket: str
    turn: int
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Event:
    """Something that happened: a restart, a changed arm, a ramp, a roll-back."""

    kind: str
    text: str
    at: str  # ISO 8601, UTC


class Store:
    """Experiments, arms, observations, verdicts and events in one SQLite file, safe with several processes.

    Args:
        path: of the file; default "experiments/experiments.sqlite" in the user's cache directory.
        keep_prompts: keep prompts' token ids, and not only their hashes.

    Raises:
        ExperimentError: the file is of a newer version of autotune, or cannot be written.
    """

    def __init__(self, path: str | Path | None = None, *, keep_prompts: bool = False) -> None:
        raise NotImplementedError

    def begin(self, name: str, mode: str, arms: Mapping[str, str], settings: Mapping[str, Any]) -> Version:
        """The version to observe under: the latest one of the same name, mode, arms and settings that is still running
        (resumed), or a new one.

        Args:
            arms: arm name -> fingerprint, the control's first.
            settings: plain JSON values that observations depend on (workload, tier, machine).
        """
        raise NotImplementedError

    def add(self, version: Version, observation: Observation) -> None:
        """Keep one observation; one with the same key is left as it was."""
        raise NotImplementedError

    def observations(self, version: Version, kind: str, arm: str | None = None) -> tuple[Observation, ...]:
        """In the order in which they were made."""
        raise NotImplementedError

    def note(self, version: Version, kind: str, text: str) -> None:
        """Keep an event."""
        raise NotImplementedError

    def events(self, version: Version) -> tuple[Event, ...]:
        raise NotImplementedError

    def conclude(self, version: Version, arm: str, verdict: str, reason: str, body: Mapping[str, Any]) -> None:
        """Keep an arm's verdict (again); the whole experiment's is that of the arm ""."""
        raise NotImplementedError

    def verdicts(self, version: Version) -> dict[str, tuple[str, str, Mapping[str, Any]]]:
        """Arm -> verdict, reason, body."""
        raise NotImplementedError

    def finish(self, version: Version, status: str = "done") -> None:
        raise NotImplementedError

    def versions(self, name: str | None = None) -> tuple[Version, ...]:
        """The latest first."""
        raise NotImplementedError
