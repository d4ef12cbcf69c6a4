"""What is kept of experiments: across restarts, processes, versions and damage."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from autotune import ExperimentError
from autotune.compare.experiment import Store, database
from autotune.compare.experiment.store import Observation

ARMS = {"control": "c0", "a": "a0"}
SETTINGS: dict[str, Any] = {"tier": "strict", "prompts": ["h1"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path)
    yield store
    store.close()


def seen(turn: int, arm: str = "a", **body: Any) -> Observation:
    return Observation(arm, "latency", "b1/p8/n8", turn, body)


def test_a_restart_goes_on(store: Store, path: Path) -> None:
    version = store.begin("x", "offline", ARMS, SETTINGS)
    store.add(version, seen(0, ttft_s=0.5, tpot_s=float("nan")))
    store.add(version, seen(0, ttft_s=9.9))  # another process was quicker
    with closing(Store(path)) as again:
        resumed = again.begin("x", "offline", ARMS, SETTINGS)
        assert (resumed.id, resumed.number, resumed.resumed) == (version.id, 1, True)
        assert again.observations(resumed, "latency") == (seen(0, ttft_s=0.5, tpot_s=None),)
        assert again.observations(resumed, "latency", "control") == ()
        assert [event.kind for event in again.events(resumed)] == ["begun", "resumed"]


@pytest.mark.parametrize(
    ("mode", "arms", "settings", "reason"),
    [
        ("offline", ARMS | {"a": "a1"}, SETTINGS, "a changed"),
        ("offline", ARMS | {"b": "b0"}, SETTINGS, "b changed"),
        ("offline", {"control": "c1", "b": "b0"}, SETTINGS, "a, b, control changed"),
        ("offline", ARMS, SETTINGS | {"tier": "relaxed"}, "tier changed"),
        ("shadow", ARMS, SETTINGS, "it was offline, this is shadow"),
    ],
)
def test_what_changed_begins_anew(
    store: Store, mode: str, arms: dict[str, str], settings: dict[str, Any], reason: str
) -> None:
    first = store.begin("x", "offline", ARMS, SETTINGS)
    store.add(first, seen(0))
    second = store.begin("x", mode, arms, settings)
    assert (second.number, second.resumed) == (2, False)
    assert second.reason == f"begun anew after version 1: {reason}"
    assert store.observations(second, "latency") == ()
    assert len(store.observations(first, "latency")) == 1


@pytest.mark.parametrize(
    "between", [("shadow", ARMS, SETTINGS), ("offline", ARMS | {"a": "a1"}, SETTINGS), ("offline", ARMS, {})]
)
def test_a_version_is_resumed_after_others_were_begun(store: Store, between: tuple[Any, ...]) -> None:
    first, other = store.begin("x", "offline", ARMS, SETTINGS), store.begin("x", *between)
    store.add(first, seen(0))
    assert [version.number for version in store.versions("x")] == [2, 1]
    again = store.begin("x", "offline", ARMS, SETTINGS)
    assert (again.id, again.reason) == (first.id, "resumed; observations kept so far: 1")
    assert [version.number for version in store.versions("x")] == [1, 2]  # the one that was used last comes first
    assert store.begin("x", *between).id == other.id
    store.finish(again)
    assert store.begin("x", "offline", ARMS, SETTINGS).number == 3


def test_what_is_done_begins_anew(store: Store) -> None:
    first = store.begin("x", "offline", ARMS, SETTINGS)
    store.finish(first)
    assert store.begin("x", "offline", ARMS, SETTINGS).reason.endswith("that one is done")
    assert store.begin("y", "offline", ARMS, SETTINGS).number == 1
    assert [(v.name, v.number, v.status) for v in store.versions()] == [
        ("y", 1, "running"),
        ("x", 2, "running"),
        ("x", 1, "done"),
    ]


def test_verdicts_replace_one_another(store: Store) -> None:
    version = store.begin("x", "offline", ARMS, SETTINGS)
    store.conclude(version, "a", "inconclusive", "too early", {})
    store.conclude(version, "a", "pass", "faster", {"gain": 1.2})
    (kept,) = store.verdicts(version).values()
    assert (kept.verdict, kept.reason, kept.body) == ("pass", "faster", {"gain": 1.2})


@pytest.mark.parametrize(("stays", "gain"), [(True, 1.2), (False, 1.3)])
def test_a_verdict_is_not_replaced_by_an_older_one(store: Store, stays: bool, gain: float) -> None:
    version, body = store.begin("x", "offline", ARMS, SETTINGS), {"gain": 1.2}
    assert store.conclude(version, "a", "pass", "faster", body, unless=lambda before: stays) is None
    found = store.conclude(
        version, "a", "pass", "faster", {"gain": 1.3}, unless=lambda before: stays and before == body
    )
    assert found == (body if stays else None)
    assert store.verdicts(version)["a"].body == {"gain": gain}


def test_all_or_nothing(store: Store) -> None:
    version = store.begin("x", "offline", ARMS, SETTINGS)
    store._open[0].execute(
        "CREATE TRIGGER t BEFORE INSERT ON observations WHEN NEW.turn = 1 BEGIN SELECT RAISE(FAIL, 'disk'); END"
    )
    with pytest.raises(ExperimentError, match="cannot be used: disk"):
        store.add_all(version, [seen(0), seen(1)])
    assert store.observations(version, "latency") == ()


@pytest.mark.parametrize(("keep", "keys"), [(False, {"hash"}), (True, {"hash", "tokens"})])
def test_prompts(path: Path, keep: bool, keys: set[str]) -> None:
    with closing(Store(path, keep_prompts=keep)) as store:
        assert set(store.prompt((5, 6, 7))) == keys
        assert store.prompt((5, 6, 7))["hash"] == store.prompt([5, 6, 7])["hash"] != store.prompt([5, 6])["hash"]


def test_only_its_owner_reads_it(store: Store, path: Path) -> None:
    store.begin("x", "offline", ARMS, SETTINGS)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert {"kept.sqlite", "kept.sqlite-wal"} <= modes.keys()
    assert set(modes.values()) == {0o600}


def test_by_default_it_is_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    with closing(Store()) as store:
        assert store.path == tmp_path / "experiments" / "experiments.sqlite"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("PRAGMA user_version = 2", "later version of autotune (schema 2, this one reads 1); upgrade autotune"),
        ("PRAGMA application_id = 7", "another program's database"),
    ],
)
def test_what_is_not_ours_is_refused(path: Path, change: str, words: str) -> None:
    Store(path).close()
    with closing(sqlite3.connect(path)) as other:
        other.execute(change)
        other.commit()
    before = path.read_bytes()
    with pytest.raises(ExperimentError) as raised:
        Store(path)
    assert words in str(raised.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["header", "middle"])
def test_a_corrupt_file_is_set_aside(path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Store(path)) as store:
        version = store.begin("x", "offline", ARMS, SETTINGS)
        store.add_all(version, [seen(turn, text="x" * 200) for turn in range(200)])
    content = bytearray(path.read_bytes())
    start = 0 if damage == "header" else len(content) // 2
    content[start : start + 4096] = b"\xa5" * 4096
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "autotune"), closing(Store(path)) as store:
        assert store.versions() == ()
    assert len([r for r in caplog.records if "is corrupt" in r.getMessage()]) == 1
    (aside,) = path.parent.glob("kept.sqlite.corrupt-*")
    assert aside.read_bytes() == content


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != "kept.sqlite.lock"
    }


def text(path: Path) -> None:
    path.write_text("my notes of a year\n" * 100)


def one_letter(path: Path) -> None:
    path.write_text("a")


def pages(path: Path) -> None:
    """Of a database's size, and none."""
    path.write_bytes(bytes(range(256)) * 64)


def linked_text(path: Path) -> None:
    text(path.with_name("notes.txt"))
    path.symlink_to(path.with_name("notes.txt"))


def linked_store(path: Path) -> None:
    Store(path.with_name("other.sqlite")).close()
    path.symlink_to(path.with_name("other.sqlite"))


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def linked_lock(path: Path) -> None:
    text(path.with_name("notes.txt"))
    path.with_name(f"{path.name}.lock").symlink_to(path.with_name("notes.txt"))


def dangling_lock(path: Path) -> None:
    path.with_name(f"{path.name}.lock").symlink_to(path.with_name("nothing"))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def pipe_as_lock(path: Path) -> None:
    os.mkfifo(path.with_name(f"{path.name}.lock"))


def other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE mine (x)")


def half_of_another(path: Path) -> None:
    """Corrupt, and not ours to move."""
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE mine (x)")
        other.executemany("INSERT INTO mine VALUES (?)", [("x" * 500,)] * 100)
        other.commit()
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (text, "not a file of experiments"),
        (one_letter, "not a file of experiments"),
        (pages, "not a file of experiments"),
        (linked_text, "is a link"),
        (linked_store, "is a link"),
        (dangling, "is a link"),
        (linked_lock, "lock is a link"),
        (dangling_lock, "lock is a link"),
        (pipe, "not a regular file"),
        (pipe_as_lock, "lock is not a regular file"),
        (Path.mkdir, "not a regular file"),
        (other_database, "another program's database"),
        (half_of_another, "another program's database"),
    ],
)
def test_what_is_someone_elses_stays_as_it_is(path: Path, make: Callable[[Path], None], words: str) -> None:
    make(path)
    before = snapshot(path.parent)
    for _ in range(2):
        with pytest.raises(ExperimentError, match="give another file: store=") as raised:
            Store(path)
        assert words in str(raised.value)
        assert snapshot(path.parent) == before


KILLED = """
import os, sys
from autotune.compare.experiment import database
database._Lock.note = lambda self: os._exit(9)
database.connect(database.Path(sys.argv[1]))
"""


def test_a_process_that_was_killed_as_it_began_leaves_a_file_of_ours(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, path], check=False, timeout=120)
    assert done.returncode == 9
    assert path.read_bytes()[68:72] != database.APPLICATION.to_bytes(4, "big")  # that is still in the journal
    with closing(Store(path)) as store:
        assert store.versions() == ()


def test_a_linked_journal_is_not_followed(path: Path) -> None:
    text(path.with_name("notes.txt"))
    path.with_name("kept.sqlite-wal").symlink_to(path.with_name("notes.txt"))
    before = snapshot(path.parent)["notes.txt"]
    with contextlib.suppress(ExperimentError), closing(Store(path)) as store:
        store.begin("x", "offline", ARMS, SETTINGS)
    assert snapshot(path.parent)["notes.txt"] == before


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_what_a_lock_file_says_already_is_kept(path: Path, link: Callable[[Path, Path], None]) -> None:
    notes, lock = path.with_name("notes.txt"), path.with_name("kept.sqlite.lock")
    notes.write_text("")
    link(notes, lock)
    with contextlib.suppress(ExperimentError):
        Store(path).close()
    assert notes.read_text() == ""
    lock.unlink()
    lock.write_text("4711")  # another program's
    Store(path).close()
    assert lock.read_text() == "4711"


def test_a_file_set_aside_before_is_not_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2026, 1, 1, tzinfo=tz)

    monkeypatch.setattr(database, "datetime", Clock)
    contents = [bytes([k]) * 4096 for k in (1, 2, 3)]
    for content in contents:
        Store(path).close()
        path.write_bytes(content)
    Store(path).close()
    assert sorted(file.read_bytes() for file in path.parent.glob("kept.sqlite.corrupt-*")) == contents


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["lock", "transaction"])
def test_a_lock_is_not_waited_for_without_end(path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(path).close()
    monkeypatch.setattr(database, "BUSY_S", 0.2)
    if how == "transaction":
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(ExperimentError, match="locked"):
                Store(path)
    else:
        command = [sys.executable, "-c", HOLDER, f"{path}.lock"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ExperimentError, match="another process has held"):
                Store(path)
            holder.kill()
    Store(path).close()


def test_a_name_that_can_be_none(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 300):
        with pytest.raises(ExperimentError, match="give another file: store="):
            Store(tmp_path / name)


WRITER = """
import sys
import threading
from autotune.compare.experiment.store import Observation, Store
store = Store(sys.argv[1])
version = store.begin("x", "offline", {"control": "c0", "a": "a0"}, {})
for turn in range(100):
    store.add(version, Observation(sys.argv[2], "latency", "", turn, {"by": sys.argv[2]}))
    store.add(version, Observation("both", "latency", "", turn, {"by": sys.argv[2]}))
print(version.number)
"""


def test_two_processes(path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, arm], stdout=subprocess.PIPE, text=True)
        for arm in ("control", "a")
    ]
    assert [writer.communicate(timeout=120)[0] for writer in writers] == ["1\n", "1\n"]
    with closing(Store(path)) as store:
        (version,) = store.versions("x")
        kept = store.observations(version, "latency")
    assert len(kept) == 300
    for arm in ("control", "a", "both"):
        assert sorted(o.turn for o in kept if o.arm == arm) == list(range(100))


@pytest.mark.fault("D61")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_a_connection_of_its_own(store: Store) -> None:
    version = store.begin("x", "offline", ARMS, SETTINGS)
    store.add(version, seen(0))
    (before,) = store._open
    child = os.fork()
    if not child:
        code = 1
        try:
            inherited = list(store._open)
            store.add(version, seen(1))
            code = 0 if not inherited and len(store.observations(version, "latency")) == 2 else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        before.execute("SELECT 1")
    store.add(version, seen(2))
    assert [each.turn for each in store.observations(version, "latency")] == [0, 1, 2]


@pytest.mark.fault("D61")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_waits_for_a_transaction(store: Store) -> None:
    version, begun, go_on = store.begin("x", "offline", ARMS, SETTINGS), threading.Event(), threading.Event()

    def write() -> None:
        with store._transaction() as db:
            begun.set()
            go_on.wait(60)
            db.execute("UPDATE experiments SET name = 'y'")

    writer = threading.Thread(target=write)
    writer.start()
    begun.wait(60)
    threading.Timer(0.2, go_on.set).start()
    child = os.fork()
    if not child:
        os._exit(0 if go_on.is_set() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    writer.join()
    assert store.observations(version, "latency") == ()


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    with pytest.raises(ExperimentError, match="was closed; open another"):
        store.begin("x", "offline", ARMS, SETTINGS)
