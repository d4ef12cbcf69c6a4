"""The SQLite file of experiments: create, open, refuse or set aside."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ...errors import ExperimentError
from ...machine import cache_dir

logger = logging.getLogger("autotune")

SCHEMA = 1  # raised whenever the meaning of a stored field changes; a newer one is refused
APPLICATION = 0x61745F65  # "at_e", SQLite's application id: identifies our files
BUSY_S = 30.0  # seconds that a process waits for another one's lock or transaction
AGAIN_S = 0.05  # seconds between two attempts to lock
HEADER = b"SQLite format 3\0"  # see https://sqlite.org/fileformat.html#the_database_header
APPLICATION_AT = slice(68, 72)
MARK = b"autotune's experiments\n"
JOURNALS = ("", "-wal", "-shm")  # name endings of SQLite's file and its journals
ANOTHER = "give another file: store=..., --store FILE"
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
    """The default file, in the user's cache directory.

    Raises:
        ExperimentError: there is no cache directory.
    """
    folder = cache_dir.cache("experiments")
    if folder is None:
        raise ExperimentError("there is no directory to keep experiments in; give a file: store='experiments.sqlite'")
    return folder / "experiments.sqlite"


def connect(path: Path) -> sqlite3.Connection:
    """Connect to a file with our tables. Creates the file if there is none, and sets aside a corrupt one of ours first.

    Raises:
        ExperimentError: the file is of a later version of autotune, of another program, a link or not a regular file,
            cannot be written, or another process holds it for longer than `BUSY_S`. The file stays unchanged.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_file(path)
        with _locked(path.with_name(f"{path.name}.lock")) as lock:
            header = _header(path)
            if header and not header.startswith(HEADER) and not lock.known():  # SQLite would overwrite a short one
                raise ExperimentError(f"{path} is not a file of experiments and was left as it is; {ANOTHER}")
            try:
                db = _opened(path)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in CORRUPT:
                    raise
                if header[APPLICATION_AT] != APPLICATION.to_bytes(4, "big") and not lock.known():
                    raise ExperimentError(
                        f"{path} is another program's database, or damaged beyond recognition ({error}), and stays as "
                        f"it is; {ANOTHER}"
                    ) from error
                _set_aside(path, error)
                db = _opened(path)
            lock.note()
            return db
    except ExperimentError:
        raise
    except (OSError, ValueError, sqlite3.Error) as error:  # ValueError: a NUL in the name
        raise ExperimentError(f"the experiments' file {path} cannot be used ({error}); {ANOTHER}") from error


class _Lock:
    """A lock file beside the experiments. A mark in it records that the experiments' file is ours."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def known(self) -> bool:
        return os.pread(self._descriptor, len(MARK), 0) == MARK

    def note(self) -> None:
        status = os.fstat(self._descriptor)
        if status.st_size == 0 and status.st_nlink == 1:
            os.pwrite(self._descriptor, MARK, 0)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[_Lock]:
    """Hold a lock file, so that two processes do not create or set aside the same file at once.

    Raises:
        OSError: it is a link or not a regular file, or another process holds it for longer than `BUSY_S`.
    """
    _require_file(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + BUSY_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError(f"another process has held {path} for {BUSY_S:.0f} s") from None
                time.sleep(AGAIN_S)
        yield _Lock(descriptor)
    finally:
        os.close(descriptor)


def _require_file(path: Path) -> None:
    """Refuse a link, which may lead to another user's file, and anything that is not a regular file.

    Raises:
        OSError: the path is one of these.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            raise OSError(f"{path} is a link")
        if not stat.S_ISREG(mode):
            raise OSError(f"{path} is not a regular file")


def _header(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(100)
    except FileNotFoundError:
        return b""


def _opened(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600))  # SQLite gives its journals this mode, too
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        db.row_factory = sqlite3.Row
        _require_readable(db, path)  # before anything is written
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # safe under WAL; a power cut may cost the last transaction
        if (damage := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            corrupt = sqlite3.DatabaseError(damage)
            corrupt.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise corrupt
        if not _tables(db):
            pragmas = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA};"
            db.executescript(f"BEGIN IMMEDIATE; {TABLES} {pragmas} COMMIT;")
    except BaseException:
        db.close()
        raise
    return db


def _tables(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _require_readable(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a database of another program or of a later version."""
    schema = db.execute("PRAGMA user_version").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION and (application or schema or _tables(db)):
        raise ExperimentError(f"{path} is another program's database; {ANOTHER}")
    if schema > SCHEMA:
        raise ExperimentError(
            f"{path} was written by a later version of autotune (schema {schema}, this one reads {SCHEMA}); "
            f"upgrade autotune, or {ANOTHER}"
        )


def _set_aside(path: Path, error: sqlite3.Error) -> None:
    """Rename a corrupt file and its journals to unused names."""
    moved = path.with_name(f"{path.name}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S}")
    while any(os.path.lexists(f"{moved}{ending}") for ending in JOURNALS):
        moved = moved.with_name(f"{moved.name}+")
    for ending in JOURNALS:
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{ending}", f"{moved}{ending}")
    logger.warning("the experiments' file %s is corrupt (%s): set aside as %s, a new one is begun", path, error, moved)
