"""Baselines on disk: whole, private, and refused when they are not what they were."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch

from autotune.compare import check
from autotune.compare.check import folder as folders
from autotune.errors import BaselineError, MeasurementError


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "baseline"))


def test_what_is_read_is_what_was_written(baseline, tmp_path):
    folders.save(baseline, tmp_path / "again")
    again = check.load(tmp_path / "again")
    assert (again.subject, again.environment, again.questions) == (
        baseline.subject,
        baseline.environment,
        baseline.questions,
    )
    assert list(again.layers) == list(baseline.layers)
    assert len(again.answers) == len(baseline.answers) == len(baseline.questions.groups)
    assert again.stepped == baseline.stepped == ()
    for one, other in zip(again.answers, baseline.answers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True))


def test_files_are_their_owners_alone(copy, baseline, tmp_path):
    folders.save(baseline, tmp_path / "new")
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "new").iterdir()} == {0o600}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_a_baseline_is_replaced_only_by_force_and_whole(copy, baseline):
    with pytest.raises(BaselineError, match="--force"):
        folders.save(baseline, copy)
    folders.save(baseline, copy, force=True)
    assert sorted(p.name for p in copy.parent.iterdir()) == ["baseline"]
    check.load(copy)


def test_what_is_no_baseline_is_never_replaced(baseline, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BaselineError, match="not a baseline"):
        folders.save(baseline, tmp_path, force=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_write_that_fails_leaves_nothing(baseline, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MeasurementError, match="No space left"):
        folders.save(baseline, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit(**changes):
    def change(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("name", "damage", "error", "said"),
    [
        ("reference.safetensors", cut, MeasurementError, "torn"),
        ("reference.safetensors", flip, MeasurementError, "changed"),
        ("reference.safetensors", Path.unlink, MeasurementError, "cannot be read"),
        ("exam.json", cut, MeasurementError, "torn"),
        ("exam.json", Path.unlink, MeasurementError, "cannot be read"),
        ("manifest.json", cut, MeasurementError, "damaged"),
        ("manifest.json", edit(created="yesterday"), MeasurementError, "changed since"),
        ("manifest.json", edit(schema=99), BaselineError, "later version"),
        ("manifest.json", edit(schema=0), BaselineError, "schema 0"),
        ("manifest.json", edit(kind="a plan"), BaselineError, "something else"),
        ("manifest.json", lambda file: file.write_text("[1]"), BaselineError, "something else"),
        ("manifest.json", Path.unlink, BaselineError, "not a baseline"),
    ],
)
def test_what_is_not_as_it_was_is_refused(copy, name, damage, error, said):
    damage(copy / name)
    with pytest.raises(error, match=said):
        check.load(copy)


def test_a_folder_that_is_not_there():
    with pytest.raises(BaselineError, match="does not exist"):
        check.load("nowhere")
