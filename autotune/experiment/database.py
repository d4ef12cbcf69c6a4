"""The SQLite file of experiments: made, opened, refused or set aside."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

from .. import folders
from ..errors import ExperimentError

logger = logging.getLogger("autotune")

SCHEMA = 1  # raised whenever the meaning of a stored field changes; a newer one is refused
APPLICATION = 0x61745F65  # "at_e": tells our files from other programs'
BUSY_S = 30.0  # how long a writer waits for another process's transaction
CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
TABLES = """
CREATE TABLE experiments (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, number INTEGER NOT NULL, mode TEXT NOT NULL, status TEXT NOT NULL,
    identity TEXT NOT NULL, settings TEXT NOT NULL, started TEXT NOT NULL, UNIQUE (name, number));
CREATE TABLE arms (
    experiment INTEGER NOT NULL REFERENCES experiments, position INTEGER NOT NULL, name TEXT NOT NULL,
    fingerprint TEXT NOT NULL, PRIMARY KEY (experiment, name));
CREATE TABLE observations (
    id INTEGER PRIMARY KEY, experiment INTEGER NOT NULL REFERENCES experiments, arm TEXT NOT NULL, kind TEXT NOT NULL,
    bucket TEXT NOT NULL, turn INTEGER NOT NULL, body TEXT NOT NULL, at TEXT NOT NULL,
    UNIQUE (experiment, arm, kind, bucket, turn));
CREATE TABLE verdicts (
    experiment INTEGER NOT NULL REFERENCES experiments, arm TEXT NOT NULL, verdict TEXT NOT NULL, reason TEXT NOT NULL,
    body TEXT NOT NULL, at TEXT NOT NULL, PRIMARY KEY (experiment, arm));
CREATE TABLE events (
    id INTEGER PRIMARY KEY, experiment INTEGER NOT NULL REFERENCES experiments, kind TEXT NOT NULL, text TEXT NOT NULL,
    at TEXT NOT NULL);
"""


def default() -> Path:
    """The file in the user's cache directory.

    Raises:
        ExperimentError: there is no such directory.
    """
    folder = folders.cache("experiments")
    if folder is None:
        raise ExperimentError("there is no directory to keep experiments in; give a file: store='experiments.sqlite'")
    return folder / "experiments.sqlite"


def connect(path: Path) -> sqlite3.Connection:
    """A connection to a file with our tables, made where there is none; a corrupt one is set aside first.

    Raises:
        ExperimentError: it is of a later version of autotune or another program's, or cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path.with_name(f"{path.name}.lock"), "w", opener=_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two processes neither make nor set aside the same file
            try:
                return _opened(path)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in CORRUPT:
                    raise
                _set_aside(path, error)
            return _opened(path)
    except (OSError, sqlite3.Error) as error:
        raise ExperimentError(
            f"the experiments' file {path} cannot be used ({error}); give another: store=..., --store FILE"
        ) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _opened(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # its journals get the same mode from SQLite
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # safe under WAL; a power cut may cost the last transaction
        if (damage := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            corrupt = sqlite3.DatabaseError(damage)
            corrupt.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise corrupt
        _prepare(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables in a new file, refuse what is not ours or of a later version."""
    schema = db.execute("PRAGMA user_version").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and application != APPLICATION:
        raise ExperimentError(f"{path} is another program's database; give another file: store=..., --store FILE")
    if schema > SCHEMA:
        raise ExperimentError(
            f"{path} was written by a later version of autotune (schema {schema}, this one reads {SCHEMA}); "
            "upgrade autotune, or give another file: store=..., --store FILE"
        )
    if not tables:
        pragmas = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA};"
        db.executescript(f"BEGIN IMMEDIATE; {TABLES} {pragmas} COMMIT;")


def _set_aside(path: Path, error: sqlite3.Error) -> None:
    moved = path.with_name(f"{path.name}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S}")
    for ending in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}{ending}", f"{moved}{ending}")
    logger.warning("the experiments' file %s is corrupt (%s): set aside as %s, a new one is begun", path, error, moved)
