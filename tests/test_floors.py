"""Imports run one way: a folder imports only from floors below it, and files import nobody who imports them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import autotune
from tests import floors

FOUND = floors.arrows()
FOLDERS = sorted({folder for names in floors.FLOORS for folder in names if folder != "errors"})


def test_every_folder_stands_on_a_floor() -> None:
    there = {floors.folder(module) for module in FOUND if module not in floors.DOORS}
    assert there == set(floors.FLOOR)


def test_imports_lead_to_floors_below() -> None:
    assert floors.upward(FOUND) == []


def test_no_files_import_each_other() -> None:
    assert floors.circles(FOUND) == []


def test_no_two_public_classes_share_a_name() -> None:
    assert floors.shared_names() == {}


def test_the_package_names_its_floors_from_the_top_down() -> None:
    lines = [line.strip() for line in (autotune.__doc__ or "").splitlines() if line.startswith("    ")]
    floor = "|".join(FOLDERS) + "|errors"
    named = [re.match(rf"(?:(?:{floor})(?:, )?)+(?=  )", line) for line in lines]
    assert [set(found[0].split(", ")) for found in named if found] == [set(names) for names in floors.FLOORS[::-1]]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_lives_there(folder: str) -> None:
    file = floors.ROOT / "autotune" / folder / "__init__.py"
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    assert len(said) > 80, f"{file} has no docstring of its own"


def test_what_runs_the_wrong_way_is_found(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from .tune import run",
        "machine/__init__.py": "",
        "machine/hardware.py": "def f():\n    from ..tune import run\n",
        "tune/__init__.py": "",
        "tune/run.py": "import typing\nif typing.TYPE_CHECKING:\n    from .bench import other\nclass Bench: ...\n",
        "tune/bench.py": "import autotune.machine.hardware\nfrom . import run\nclass Bench: ...\nclass _Own: ...\n",
    }
    for name, text in files.items():
        file = tmp_path / "autotune" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert floors.shared_names(tmp_path) == {"Bench": ["autotune.tune.bench", "autotune.tune.run"]}
    found = floors.arrows(tmp_path)
    assert floors.upward(found) == ["autotune.machine.hardware, line 2, imports autotune.tune.run"]
    ring = ["autotune.machine.hardware", "autotune.tune.bench", "autotune.tune.run"]
    assert floors.circles(found) == [ring]
