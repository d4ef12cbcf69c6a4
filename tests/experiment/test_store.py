"""What is kept of experiments: across restarts, processes, versions and damage."""

from __future__ import annotations

import logging
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from autotune import ExperimentError
from autotune.experiment import Store
from autotune.experiment.store import Observation

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


def test_all_or_nothing(store: Store) -> None:
    version = store.begin("x", "offline", ARMS, SETTINGS)
    store._db.execute(
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


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="give another: store="):
        Store(tmp_path)


WRITER = """
import sys
from autotune.experiment.store import Observation, Store
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
