"""What runs first on a GPU: parts that fail, hang or leave children behind hide nothing of what the others print."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import first_hour, gpu_seen

ROOT = Path(__file__).parents[1]
HANGS = """
import signal, time
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def test_fails():
    assert 6 * 7 == 43


def test_hangs():
    if {deaf}:  # as one that waits inside a library
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path({hanging!r}).touch()
    time.sleep(600)
"""


def test_the_first_hour_goes_on_when_a_part_fails(tmp_path: Path) -> None:
    def part(script: str, seconds: float = 60.0) -> first_hour.Part:
        return first_hour.Part((sys.executable, "-c", script), seconds)

    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    parts = {
        "good": part("print('fine')"),
        "bad": part("raise SystemExit(3)"),
        "slow": part(f"print('begun', flush=True)\n{child}", 2.0),
        "last": part("print('still here')"),
    }
    file = tmp_path / "new" / "report.md"
    assert first_hour.main(["--out", str(file)], parts) == 1
    told = file.read_text()
    for line in ("| good | passed |", "| bad | failed (3) |", "| slow | ended: out of time |", "| last | passed |"):
        assert line in told
    assert all(each in told for each in ("fine", "begun", "still here"))
    assert first_hour.main(["--parts", "last,good", "--out", str(file)], parts) == 0
    with pytest.raises(SystemExit):
        first_hour.main(["--parts", "nothing"], parts)


@pytest.mark.parametrize(
    ("built", "available", "says"),
    [(None, False, "is built without CUDA"), ("13.0", False, "sees no GPU"), ("13.0", True, None)],
)
def test_why_torch_sees_no_gpu(
    built: str | None, available: bool, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    found = gpu_seen.obstacle()
    assert found is None if says is None else says in (found or "")


def test_without_a_gpu_the_first_part_says_why_and_no_other_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert next(iter(first_hour.PARTS)) == first_hour.DEVICE
    parts = {
        first_hour.DEVICE: first_hour.Part((sys.executable, "-c", "import sys; sys.exit('torch sees none')"), 60.0),
        "next": first_hour.Part((sys.executable, "-c", ""), 60.0),
    }
    file = tmp_path / "report.md"
    assert first_hour.main(["--out", str(file)], parts) == 1
    for told in (capsys.readouterr().out, file.read_text()):
        assert "torch sees none" in told
    assert "| next | not run | - |" in file.read_text()


@pytest.mark.parametrize(("body", "code"), [("pytest.skip('no GPU')", 5), ("pass", 0), ("assert False", 1)])
def test_a_part_whose_tests_are_all_skipped_fails(
    body: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that fell off the bus is one that the tests do not see."""
    script = tmp_path / "test_it.py"
    script.write_text(f"import pytest\npytestmark = pytest.mark.gpu\ndef test_one():\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = first_hour.run(first_hour.Part(first_hour.tests("gpu", str(script)), 600.0), 600.0)
    assert found.code == code
    assert ("all were skipped" in found.output) is (code == 5)


def test_the_first_hour_ends_in_time(tmp_path: Path) -> None:
    clock = iter([0.0, 0.0, 3000.0 - first_hour.GRACE_S])  # the last part could not be ended in what is left
    parts = {name: first_hour.Part((sys.executable, "-c", ""), 60.0) for name in ("one", "two")}
    assert first_hour.main(["--out", str(tmp_path / "r.md")], parts, lambda: next(clock)) == 1
    assert "| two | not run | - |" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize("deaf", [False, True], ids=["ends when asked", "ends when killed"])
def test_a_part_that_hangs_leaves_the_reasons_of_what_failed(
    deaf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, hanging, limit_s, wait = tmp_path / "test_it.py", tmp_path / "hanging", 1e6, subprocess.Popen.wait
    script.write_text(HANGS.format(deaf=deaf, hanging=str(hanging)))

    def until_it_hangs(process: Any, timeout: float) -> int:
        while timeout == limit_s and not hanging.exists():
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.05)
        return wait(process, 0.0 if timeout == limit_s else timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", until_it_hangs)
    monkeypatch.setattr(first_hour, "ENDING", dict.fromkeys(first_hour.ENDING, 1.0 if deaf else 60.0))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = first_hour.run(first_hour.Part(first_hour.tests("gpu", str(script)), limit_s), limit_s)
    assert str(found) == "ended: out of time"
    assert "assert (6 * 7) == 43" in found.output
    assert "test_it.py::test_hangs" in found.output, "nothing says which test hangs"
    assert ("KeyboardInterrupt" in found.output) is not deaf


def test_children_that_a_part_leaves_behind_are_ended(tmp_path: Path) -> None:
    child = "import os, time; open(r'{0}', 'w').write(str(os.getpid())); os.rename(r'{0}', r'{1}'); time.sleep(600)"
    name = child.format(tmp_path / "draft", tmp_path / "child")
    script = (
        f"import subprocess, sys, os, time; subprocess.Popen([sys.executable, '-c', {name!r}])\n"
        f"while not os.path.exists({str(tmp_path / 'child')!r}): time.sleep(0.05)"
    )
    assert first_hour.run(first_hour.Part((sys.executable, "-c", script), 60.0), 60.0).code == 0
    stat = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":  # an orphan may wait for its reaper
        time.sleep(0.05)


def test_all_parts_and_their_endings_are_within_the_time() -> None:
    assert first_hour.most_s({"a": first_hour.Part((), 7.0), "b": first_hour.Part((), 5.0)}) == 12 + 2 * (10 + 5 + 5)
    assert first_hour.most_s(first_hour.PARTS) <= 60 * first_hour.MINUTES == 3000


def test_every_test_for_a_gpu_is_in_a_part() -> None:
    folders = {word for part in first_hour.PARTS.values() for word in part.command if word.startswith("tests/")}
    marked = [
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^@pytest\.mark\.gpu$", path.read_text(), re.M)
    ]
    assert len(marked) > 5
    assert not [path for path in marked if not any(path.is_relative_to(ROOT / folder) for folder in folders)]
