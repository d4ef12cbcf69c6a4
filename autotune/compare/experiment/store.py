"""Experiments on disk, in SQLite: observations, verdicts and events.

Write-ahead logging and short transactions let several processes write and read at once. Prompts are saved only as
hashes by default.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import ExperimentError
from ...machine import forking
from ...machine.cache_dir import expanded
from . import database

logger = logging.getLogger("autotune")


@dataclass(frozen=True)
class Version:
    """One version of an experiment. The same name with other arms or settings is another version.

    Args:
        id: its key in the database.
        name: name of the experiment.
        number: 1, 2, ...
        mode: "offline", "shadow" or "split".
        status: "done", or "running"; a split or a shadow stays so, and goes on when it is started again.
        started: ISO 8601, UTC.
        resumed: whether its earlier observations count.
        reason: why it was resumed or begun, in a sentence.
    """

    id: int
    name: str
    number: int
    mode: str
    status: str
    started: str
    resumed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Observation:
    """One measurement of one arm.

    Args:
        arm: name of the arm.
        kind: "latency", "quality", "prompt" or "noise".
        bucket: bucket of the workload; empty if it does not apply.
        turn: number of the pair or request. Arm, kind, bucket and turn are the key.
        body: the measurement as plain JSON values.
    """

    arm: str
    kind: str
    bucket: str
    turn: int
    body: Mapping[str, Any]


@dataclass(frozen=True)
class ExperimentEvent:
    """Something that happened: a restart, a changed arm, a ramp, a roll-back."""

    kind: str
    text: str
    at: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Concluded:
    """The verdict on an arm; `body` is the whole outcome as plain JSON values."""

    verdict: str
    reason: str
    body: Mapping[str, Any]


class Store:
    """Experiments, arms, observations, verdicts and events in one SQLite file. Safe for threads and processes.

    Args:
        path: the file, created with mode 0600; default "experiments/experiments.sqlite" in the user's cache directory.
        keep_prompts: whether to save prompts' token ids, not only their hashes.

    Raises:
        ExperimentError: the file is of a newer version of autotune or of another program, or cannot be written.
    """

    def __init__(self, path: str | Path | None = None, *, keep_prompts: bool = False) -> None:
        self.path = database.default() if path is None else expanded(path)
        self.keep_prompts = keep_prompts
        self._lock = threading.RLock()
        self._open = [database.connect(self.path)]  # empty after a fork, until the next use
        self._closing = weakref.finalize(self, _close, self._open)
        forking.let_go(self)

    def close(self) -> None:
        """Close the file. The store cannot be used afterwards."""
        self._closing()

    def before_fork(self) -> None:
        """Close the connection: SQLite's connections must not exist in a child, not even to be closed there."""
        self._lock.acquire()
        _close(self._open)

    def after_fork(self) -> None:
        """Release the lock. The next use opens the file again."""
        self._lock.release()

    def begin(self, name: str, mode: str, arms: Mapping[str, str], settings: Mapping[str, Any]) -> Version:
        """Begin or resume a version, under which observations are saved.

        Resumes the latest version that is still running and has the same name, mode, arms and settings, even if another
        one was begun since. Otherwise begins a new one.

        Args:
            name: name of the experiment.
            mode: "offline", "shadow" or "split".
            arms: arm name -> fingerprint, the control's first.
            settings: plain JSON values that observations depend on (workload, tier, machine).
        """
        wanted = json.dumps(settings, sort_keys=True)
        identity = _hash(json.dumps([mode, dict(arms), wanted]))
        with self._transaction() as db:
            same = db.execute(
                "SELECT * FROM experiments WHERE name = ? AND identity = ? AND status = 'running' ORDER BY number DESC",
                (name, identity),
            ).fetchone()
            if same:
                kept = _count(db, same["id"])
                version = _version(same, resumed=True, reason=f"resumed; observations kept so far: {kept}")
            else:
                last = db.execute("SELECT * FROM experiments WHERE name = ? ORDER BY number DESC", (name,)).fetchone()
                reason = self._difference(db, last, mode, arms, wanted) if last else "begun"
                number = last["number"] + 1 if last else 1
                row = (name, number, mode, "running", identity, wanted, _now())
                into = "INSERT INTO experiments (name, number, mode, status, identity, settings, started)"
                key = db.execute(f"{into} VALUES (?, ?, ?, ?, ?, ?, ?)", row).lastrowid
                rows = [(key, k, arm, print_) for k, (arm, print_) in enumerate(arms.items())]
                db.executemany("INSERT INTO arms VALUES (?, ?, ?, ?)", rows)
                fresh = db.execute("SELECT * FROM experiments WHERE id = ?", (key,)).fetchone()
                version = _version(fresh, reason=reason)
            _note(db, version.id, "resumed" if version.resumed else "begun", version.reason)
        logger.info("experiment %s, version %d: %s", name, version.number, version.reason)
        return version

    def _difference(
        self, db: sqlite3.Connection, last: sqlite3.Row, mode: str, arms: Mapping[str, str], settings: str
    ) -> str:
        """Why the latest version is not resumed, in words."""
        before = dict(db.execute("SELECT name, fingerprint FROM arms WHERE experiment = ?", (last["id"],)).fetchall())
        changed = sorted(a for a in {*before, *arms} if before.get(a) != arms.get(a))
        if last["mode"] != mode:
            why = f"it was {last['mode']}, this is {mode}"
        elif changed:
            why = f"{', '.join(changed)} changed"
        elif last["settings"] != settings:
            old, new = json.loads(last["settings"]), json.loads(settings)
            why = ", ".join(sorted(k for k in {*old, *new} if old.get(k) != new.get(k))) + " changed"
        else:
            why = f"that one is {last['status']}"
        return f"begun anew after version {last['number']}: {why}"

    def add(self, version: Version, observation: Observation) -> None:
        """Save one observation. An existing one with the same key stays unchanged."""
        self.add_all(version, (observation,))

    def add_all(self, version: Version, observations: Sequence[Observation]) -> None:
        """Save observations that belong together, all or none."""
        rows = [(version.id, o.arm, o.kind, o.bucket, o.turn, _encode(o.body), _now()) for o in observations]
        into = "INSERT OR IGNORE INTO observations (experiment, arm, kind, bucket, turn, body, at)"
        with self._transaction() as db:
            db.executemany(f"{into} VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def observations(self, version: Version, kind: str, arm: str | None = None) -> tuple[Observation, ...]:
        """A version's observations of one kind, in the order in which they were made."""
        with self._transaction(write=False) as db:
            rows = db.execute(
                "SELECT * FROM observations WHERE experiment = ? AND kind = ? AND (? IS NULL OR arm = ?) ORDER BY id",
                (version.id, kind, arm, arm),
            ).fetchall()
        return tuple(Observation(r["arm"], r["kind"], r["bucket"], r["turn"], self._decode(r["body"])) for r in rows)

    def note(self, version: Version, kind: str, text: str) -> None:
        """Save an event."""
        with self._transaction() as db:
            _note(db, version.id, kind, text)

    def events(self, version: Version) -> tuple[ExperimentEvent, ...]:
        """A version's events, in the order in which they happened."""
        with self._transaction(write=False) as db:
            rows = db.execute("SELECT * FROM events WHERE experiment = ? ORDER BY id", (version.id,)).fetchall()
        return tuple(ExperimentEvent(r["kind"], r["text"], r["at"]) for r in rows)

    def conclude(
        self,
        version: Version,
        arm: str,
        verdict: str,
        reason: str,
        body: Mapping[str, Any],
        *,
        unless: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> Mapping[str, Any] | None:
        """Save an arm's verdict, and replace an earlier one. The arm "" stands for the whole experiment.

        Args:
            unless: called with the body of the earlier verdict, if there is one, in the transaction that would replace
                it. If it returns True, nothing is saved.

        Returns:
            The body of the earlier verdict if that was not replaced, else None.
        """
        row = (version.id, arm, verdict, reason, _encode(body), _now())
        with self._transaction() as db:
            if unless is not None:
                of_arm = "SELECT body FROM verdicts WHERE experiment = ? AND arm = ?"
                found = db.execute(of_arm, (version.id, arm)).fetchone()
                if found and unless(before := self._decode(found["body"])):
                    return before
            db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", row)
        return None

    def verdicts(self, version: Version) -> dict[str, Concluded]:
        """Arm -> its verdict."""
        with self._transaction(write=False) as db:
            rows = db.execute("SELECT * FROM verdicts WHERE experiment = ?", (version.id,)).fetchall()
        return {r["arm"]: Concluded(r["verdict"], r["reason"], self._decode(r["body"])) for r in rows}

    def finish(self, version: Version, status: str = "done") -> None:
        """End this version: no further observations are made under it."""
        with self._transaction() as db:
            db.execute("UPDATE experiments SET status = ? WHERE id = ?", (status, version.id))

    def versions(self, name: str | None = None) -> tuple[Version, ...]:
        """All versions, or those of one experiment, in the order of their latest events, the latest first."""
        with self._transaction(write=False) as db:
            rows = db.execute(
                "SELECT * FROM experiments WHERE ? IS NULL OR name = ? "
                "ORDER BY (SELECT max(id) FROM events WHERE experiment = experiments.id) DESC, id DESC",
                (name, name),
            ).fetchall()
        return tuple(map(_version, rows))

    def prompt(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The stored form of a prompt: its hash, and its token ids if `keep_prompts`."""
        kept: dict[str, Any] = {"hash": _hash(json.dumps(list(tokens)))}
        return kept | {"tokens": list(tokens)} if self.keep_prompts else kept

    def _decode(self, body: str) -> dict[str, Any]:
        try:
            found: Any = json.loads(body)
        except (TypeError, ValueError, RecursionError) as error:
            raise ExperimentError(f"what {self.path} keeps is not JSON ({error}); give another file") from error
        if not isinstance(found, dict):
            raise ExperimentError(f"{self.path} keeps {body[:40]!r} where an object was expected; give another file")
        return found

    @contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """Run the block in a transaction. It must be short: nothing may be measured in it."""
        try:
            with self._lock:
                db = self._connection()
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):  # report the first error, not this one
                        db.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            raise ExperimentError(f"the experiments' file {self.path} cannot be used: {error}") from error

    def _connection(self) -> sqlite3.Connection:
        if not self._closing.alive:
            raise ExperimentError(f"the store of {self.path} was closed; open another one")
        if not self._open:
            self._open.append(database.connect(self.path))
        return self._open[0]


def _close(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()


def _version(row: sqlite3.Row, resumed: bool = False, reason: str = "") -> Version:
    return Version(row["id"], row["name"], row["number"], row["mode"], row["status"], row["started"], resumed, reason)


def _note(db: sqlite3.Connection, experiment: int, kind: str, text: str) -> None:
    into = "INSERT INTO events (experiment, kind, text, at) VALUES (?, ?, ?, ?)"
    db.execute(into, (experiment, kind, text, _now()))


def _count(db: sqlite3.Connection, experiment: int) -> int:
    found = db.execute("SELECT count(*) FROM observations WHERE experiment = ?", (experiment,)).fetchone()
    return int(found[0])


def _encode(body: Mapping[str, Any]) -> str:
    from ...tune import codec

    return json.dumps(codec.encode(body), allow_nan=False)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
