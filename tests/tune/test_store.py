"""Plan files: written whole or not at all, and whatever is wrong with one is a miss with one warning."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autotune import transforms
from autotune.machine import cache_dir
from autotune.tune import plan, store
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

FINGERPRINT = Fingerprint("m" * 32, "cpu, Some CPU, AVX2, 2 threads", {"torch": "2.13.0"}, "w", "balanced:1", "strict")
KEEP = Plan(FINGERPRINT, (), created="2026-01-01T00:00:00+00:00")
FASTER = replace(KEEP, transforms=(transforms.make("threads", {"count": 1}, "decode"),))


@pytest.fixture(autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


@pytest.fixture
def path() -> Path:
    """Where FASTER is stored."""
    saved = store.save(FASTER)
    assert saved is not None
    return saved


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "autotune" and r.levelno == logging.WARNING]


@pytest.mark.parametrize("value", [FASTER, KEEP], ids=["faster", "keep the original"])
def test_what_is_saved_is_found(value: Plan, caplog: pytest.LogCaptureFixture) -> None:
    assert store.find(FINGERPRINT) is None
    saved = store.save(value)
    assert saved == store.path_for(FINGERPRINT)
    assert store.find(FINGERPRINT) == value
    assert not warnings(caplog)


def test_the_newest_plan_counts() -> None:
    store.save(FASTER)
    store.save(KEEP)
    assert store.find(FINGERPRINT) == KEEP


def test_nobody_else_can_read_or_write(path: Path, cache: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    assert [d.stat().st_mode & 0o777 for d in (path.parent, cache)] == [0o700, 0o700]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.fault("F74")
@pytest.mark.parametrize(
    "change",
    [
        {"model": "n" * 32},
        {"hardware": "cpu, Another CPU, AVX2, 2 threads"},
        {"versions": {"torch": "2.13.1"}},
        {"versions": {"torch": "2.13.0", "torchao": "0.18"}},
        {"workload": "v"},
        {"policy": "balanced:2"},
        {"tier": "lossless"},
    ],
)
def test_any_other_fingerprint_is_a_quiet_miss(
    path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    other = replace(FINGERPRINT, **change)
    assert store.path_for(other) != path
    assert store.find(other) is None
    assert not warnings(caplog)


@pytest.mark.fault("F77")
def test_another_schema_has_another_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SCHEMA", plan.SCHEMA + 1)
    assert store.path_for(FINGERPRINT) != path  # neither reads nor destroys what the other version keeps


def test_names_in_a_fingerprint_do_not_reach_the_path(cache: Path) -> None:
    hostile = replace(FINGERPRINT, model="../../../etc/passwd", policy="a/b\0c")
    found = store.path_for(hostile)
    assert found is not None
    assert found.parent == cache / "plans"
    assert found.stem.isalnum()


class _Canary:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def _edited(edit: Callable[[dict[str, Any]], None]) -> bytes:
    data = json.loads(plan.dumps(FASTER))
    edit(data)
    return json.dumps(data).encode()


GOOD = plan.dumps(FASTER).encode()
BAD = {
    "zero-byte": b"",
    "truncated": GOOD[:-20],
    "binary": bytes(range(256)) * 8,
    "BOM": b"\xef\xbb\xbf" + GOOD,
    "deeply nested": b"[" * 1_000_000,
    "duplicate key": b'{"schema": 1,' + GOOD.lstrip()[1:],
    "NaN": GOOD.replace(b'"quality": null', b'"quality": NaN'),
    "huge number": GOOD.replace(b'"count": 1', b'"count": ' + b"9" * 5000),
    "wrong type": _edited(lambda d: d.update(transforms="threads")),
    "future schema": _edited(lambda d: d.update(schema=999)),
    "past schema": _edited(lambda d: d.update(schema=0)),
    "unknown transform": _edited(lambda d: d["transforms"][0].update(name="quantum")),
    "module:callable": _edited(lambda d: d["transforms"][0].update(name="os:system", params={"command": "touch x"})),
    "unknown key": _edited(lambda d: d.update(__reduce__="os.system")),
    "foreign": _edited(lambda d: d["fingerprint"].update(model="other")),
    "too large": GOOD + b" " * store.MAX_BYTES,
}


@pytest.mark.fault("F73")
@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_a_miss_with_one_warning(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(content)
    assert store.find(FINGERPRINT) is None
    assert len(warnings(caplog)) == 1
    assert str(path) in warnings(caplog)[0]
    assert store.save(FASTER) == path  # and it does not stand in the way
    assert store.find(FINGERPRINT) == FASTER
    assert len(warnings(caplog)) == 1


def test_a_bad_file_is_set_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"garbage")
    assert store.find(FINGERPRINT) is store.find(FINGERPRINT) is None
    assert len(warnings(caplog)) == 1
    assert path.with_name(f"{path.name}.refused").read_bytes() == b"garbage"


@pytest.mark.fault("F75")
def test_a_pickle_is_not_run(path: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path.write_bytes(pickle.dumps(_Canary(canary)))
    assert store.find(FINGERPRINT) is None
    assert not canary.exists()
    pickle.loads(pickle.dumps(_Canary(canary)))  # it would have shown
    assert canary.exists()


def _link(path: Path) -> None:
    path.rename(path.with_name("target"))
    path.symlink_to("target")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.fault("F75")
@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (_link, "symbolic link"),
        (_directory, "Is a directory"),
        (_pipe, "not a regular file"),
        (lambda path: path.chmod(0o620), "it can be written by other users"),
        (lambda path: path.chmod(0o602), "it can be written by other users"),
        (lambda path: path.parent.chmod(0o777), "plans can be written by other users"),
        (lambda path: path.parent.chmod(0o770), "plans can be written by other users"),
    ],
    ids=["symlink", "directory", "pipe", "group file", "world file", "world directory", "group directory"],
)
def test_what_others_could_have_written_is_ignored(
    path: Path, tamper: Callable[[Path], None], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    tamper(path)
    assert store.find(FINGERPRINT) is None
    assert len(warnings(caplog)) == 1
    assert says in warnings(caplog)[0]


def test_what_belongs_to_another_user_is_ignored(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert store.find(FINGERPRINT) is None
    assert f"belongs to user {owner}" in warnings(caplog)[0]
    assert path.read_bytes() == GOOD


@pytest.mark.fault("A29")
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_plan_and_nothing_else(
    path: Path, step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        assert store.save(KEEP) is None
        assert store.save(KEEP) is None
    assert len(warnings(caplog)) == 1
    assert "No space left" in warnings(caplog)[0]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert store.find(FINGERPRINT) == FASTER


WRITER = """
import os, signal, sys
from autotune.tune import plan, store
one, two = (plan.loads(text) for text in sys.stdin.read().split("---"))
if sys.argv[1] == "killed":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.save(two)
for _ in range(100):
    store.save(one)
    store.save(two)
"""


def _writer(mode: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, mode], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(f"{plan.dumps(FASTER)}---{plan.dumps(KEEP)}")
    process.stdin.close()
    return process


@pytest.mark.fault("F76")
def test_killed_between_write_and_rename_the_old_plan_stays(path: Path) -> None:
    assert _writer("killed").wait(120) == -signal.SIGKILL
    assert len(list(path.parent.iterdir())) == 2  # the temporary file was there
    assert store.find(FINGERPRINT) == FASTER
    assert store.save(KEEP) == path


@pytest.mark.fault("F76")
@pytest.mark.slow
def test_concurrent_writers_never_leave_half_a_plan(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writers = [_writer("writes") for _ in range(3)]
    while any(writer.poll() is None for writer in writers):
        assert store.find(FINGERPRINT) in (FASTER, KEEP)
        store.save(FASTER)
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert not warnings(caplog)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"AUTOTUNE_CACHE_DIR": "own", "XDG_CACHE_HOME": "xdg", "HOME": "home"}, "own"),
        ({"XDG_CACHE_HOME": "xdg", "HOME": "home"}, "xdg/autotune"),
        ({"HOME": "home"}, "home/.cache/autotune"),
        ({"AUTOTUNE_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "home"}, "home/.cache/autotune"),
    ],
)
def test_the_cache_directory(
    environment: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AUTOTUNE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    assert cache_dir.cache() == tmp_path / expected
    assert cache_dir.cache("plans") == tmp_path / expected / "plans"
    assert (tmp_path / expected / "plans").is_dir()


def test_a_relative_xdg_directory_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOTUNE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir.cache() == tmp_path / ".cache" / "autotune"


def _read_only(_: pytest.MonkeyPatch) -> None: ...


def _without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("AUTOTUNE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)


@pytest.mark.parametrize("break_it", [_read_only, _without_home])
def test_without_a_usable_directory_a_temporary_one_serves(
    break_it: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "file" / "cache"))  # cannot be made, whoever one is
    break_it(monkeypatch)
    saved = store.save(FASTER)
    assert saved is not None
    assert store.find(FINGERPRINT) == FASTER
    assert len(warnings(caplog)) == 1
    assert "set AUTOTUNE_CACHE_DIR" in warnings(caplog)[0]


def test_without_any_directory_there_is_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> str:
        raise FileNotFoundError("No usable temporary directory found")

    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert cache_dir.cache() is None
    assert store.path_for(FINGERPRINT) is None
    assert store.save(FASTER) is None
    assert store.find(FINGERPRINT) is None
    assert len(warnings(caplog)) == 1
