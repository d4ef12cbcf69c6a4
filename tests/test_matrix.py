"""The matrix runner without its rows: which there are, what an environment finds, what becomes of a suite."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import matrix
from tests.matrix import PINNED, Result, Row, conclude, limited, one, overlay, rows, selected, table, versions

INSTALLED = {"torch": "2.13.0", "transformers": "5.24.0", "torchao": "0.18.0"}
JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="4">
<testcase classname="tests.live.test_wrap" name="test_good"/>
<testcase classname="tests.live.test_wrap" name="test_bad">
<failure message="KeyError: key&#10;more">E</failure></testcase>
<testcase classname="tests.runtime.test_loop" name="test_broken"><error message="fixture">E</error></testcase>
<testcase classname="tests.runtime.test_loop" name="test_idle">
<skipped type="pytest.skip" message="no compiler"/></testcase>
</testsuite></testsuites>
"""
GOOD = JUNIT.replace("failure", "properties").replace("error ", "properties ").replace("</error>", "</properties>")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    return tmp_path


def test_a_row_for_every_version_that_is_not_installed() -> None:
    names = [row.name for row in rows(INSTALLED)]
    assert names[0] == "as pinned"
    assert {"transformers 4.57.6", "transformers 5.23.0", "torchao 0.17.0", "accelerate 1.14.0"} <= set(names)
    assert not {"transformers 5.24.0", "torchao 0.18.0"} & set(names)


def test_rows_on_request() -> None:
    assert selected("as pinned, torchao==0.17.0", [], False, False, INSTALLED) == [PINNED, one("torchao==0.17.0")]
    assert selected("", ["2.14.1"], False, False, INSTALLED) == [Row("torch 2.14.1", ("torch==2.14.1",))]
    (newest,) = selected("", [], True, False, INSTALLED)
    assert {"transformers", "peft", "pytest", "torchao", "gguf"} <= set(newest.newest)
    assert "torch" not in newest.newest
    assert ("triton" in newest.newest) is (find_spec("triton") is not None), "it is for Linux on x86-64"
    assert "torch" in selected("", [], True, True, INSTALLED)[0].newest
    with pytest.raises(ValueError, match="expected NAME==VERSION"):
        selected("transformers>5", [], False, False, INSTALLED)


def test_an_environment_finds_its_own_first_and_then_the_projects(folder: Path) -> None:
    python = overlay(folder / "row")
    assert versions(python) == versions(Path(sys.executable))
    (own,) = (folder / "row").glob("lib/*/site-packages")
    (own / "torchao.py").write_text("here = True\n")
    (own / "torchao-0.1.dist-info").mkdir()
    (own / "torchao-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.1\n")
    assert versions(python) == versions(Path(sys.executable)) | {"torchao": "0.1"}
    subprocess.run([str(python), "-c", "import torchao, pytest; assert torchao.here"], check=True, cwd=folder)


def test_a_package_that_cannot_be_installed_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    result = matrix.test(one("transformers==0.0.0"), 1.0)
    assert result.outcome == "NOT INSTALLED"
    assert "transformers==0.0.0" in result.detail


def test_a_suite_that_hangs_is_killed(folder: Path) -> None:
    start = time.monotonic()
    assert limited([sys.executable, "-c", "import threading; threading.Event().wait()"], folder / "log", 0.5) is None
    assert time.monotonic() - start < 60
    assert limited([sys.executable, "-c", "raise SystemExit(3)"], folder / "log", 60) == 3


@pytest.mark.parametrize(
    ("written", "code", "outcome", "counts"),
    [
        (GOOD, 0, "passed", (3, 0, 1)),
        (JUNIT, 1, "FAILED", (1, 2, 1)),
        (GOOD, 3, "DID NOT RUN", (3, 0, 1)),
        ("", 4, "DID NOT RUN", (0, 0, 0)),
        ("<testsuites", -9, "DID NOT RUN", (0, 0, 0)),
        ("<testsuites/>", 0, "DID NOT RUN", (0, 0, 0)),
        ("", None, "TIME-OUT", (0, 0, 0)),
    ],
)
def test_what_becomes_of_a_suite(
    written: str, code: int | None, outcome: str, counts: tuple[int, int, int], folder: Path
) -> None:
    (folder / "log").write_text("ImportError: no such name\n\n")
    if written:
        (folder / "xml").write_text(written)
    result = conclude(PINNED, code, folder / "xml", folder / "log", 12.0)
    assert (result.outcome, (result.passed, result.failed, result.skipped)) == (outcome, counts)
    if outcome == "FAILED":
        assert result.failures["tests/live/test_wrap.py::test_bad"] == "KeyError: key"
        assert "test_bad: KeyError" in matrix.details(result)[0]
    elif outcome != "passed":
        assert result.detail.endswith("ImportError: no such name")


def test_the_table() -> None:
    results = [
        Result(PINNED, "passed", 9, 0, 1, 61.4, INSTALLED),
        Result(one("torchao==0.17.0"), "FAILED", 8, 1, 1, 60.0),
    ]
    assert table(results, "2026-11-26").splitlines()[4:] == [
        "| as pinned: torch 2.13.0, transformers 5.24.0, torchao 0.18.0 | 9 | 0 | 1 | 61 | passed |",
        "| torchao 0.17.0 | 8 | 1 | 1 | 60 | FAILED |",
    ]
