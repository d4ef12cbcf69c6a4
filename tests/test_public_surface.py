"""What users may rely on: the names at the top level, and the arguments of `wrap`."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import autotune
from autotune import errors
from autotune.tune import policy
from tests import floors

NAMES = [
    "AutotuneError",
    "DeviceError",
    "Experiment",
    "ExperimentError",
    "Handle",
    "MeasurementError",
    "Plan",
    "PlanError",
    "Policy",
    "PolicyError",
    "StateError",
    "Status",
    "Transform",
    "TransformError",
    "UnsupportedModelError",
    "VariantError",
    "Workload",
    "WorkloadError",
    "unsupported",
    "wrap",
]
ARGUMENTS = {
    "model": inspect.Parameter.empty,
    "tokenizer": None,
    "draft": None,
    "policy": "balanced",
    "workload": None,
    "when": "background",
    "observe": 3,
    "cache": True,
    "keep_original": True,
    "watch": 0.01,
    "progress": None,
    "plan": None,
}
HANDLE = ["adopt", "commit", "events", "plan", "report", "rollback", "status", "submit", "tune", "unwrap"]


def test_the_names_at_the_top_level() -> None:
    assert sorted(autotune.__all__) == sorted(NAMES)
    assert all(hasattr(autotune, name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_says_what_it_is(name: str) -> None:
    thing = getattr(autotune, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        assert thing.__doc__, f"{name} inherits its docstring"


def test_the_arguments_of_wrap() -> None:
    parameters = inspect.signature(autotune.wrap).parameters
    assert {name: p.default for name, p in parameters.items()} == ARGUMENTS
    assert [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == ["model"]
    for name in ARGUMENTS:
        assert f"{name}: " in str(inspect.getdoc(autotune.wrap)), f"{name} is not documented"


@pytest.mark.parametrize("name", HANDLE)
def test_what_a_handle_offers(name: str) -> None:
    assert inspect.getattr_static(autotune.Handle, name)


def test_the_errors_that_users_catch_are_drawn_in_the_tree() -> None:
    raised = [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, BaseException)]
    assert len(raised) > 5
    for error in raised:
        assert error.__name__ in str(errors.__doc__), f"{error.__name__} is missing from the tree"


@pytest.mark.parametrize("name", [name for name in floors.modules() if not name.endswith("__main__")])
def test_every_error_is_an_autotune_error(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:  # triton, uvicorn
        pytest.skip(str(error))
    own = [thing for thing in vars(module).values() if inspect.isclass(thing) and thing.__module__ == name]
    raised = [e for e in own if issubclass(e, Exception) and e.__name__.endswith("Error") and e.__name__[0] != "_"]
    assert [e for e in raised if not issubclass(e, errors.AutotuneError)] == []


def test_the_version_is_that_of_the_distribution() -> None:
    assert autotune.__version__ == metadata.version("autotune-inference")


def test_the_policies() -> None:
    assert set(policy.available()) == {"balanced", "latency", "throughput", "memory", "lossless"}
    assert all(autotune.Policy.load(name).name == name for name in policy.available())


PUBLIC = r"autotune(\.(transforms|errors|compare(\.(check|experiment))?))?"
EXAMPLES = [*(floors.ROOT / "examples").glob("*.py"), *(floors.ROOT / "examples" / "custom_transform").glob("*.py")]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_need_public_names_alone(file: Path) -> None:
    found = re.findall(r"^\s*(?:from|import) (autotune[\w.]*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in found if not re.fullmatch(PUBLIC, name)] == []


def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Policies, kernels' sources, the page, styles and the marker for types, not only Python."""
    source, to = tmp_path / "source", tmp_path / "wheel"
    for name in ("autotune", "autotune_pytest", "policies"):
        shutil.copytree(floors.ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(floors.ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(to), str(source)], check=True, timeout=300)
    (wheel,) = to.iterdir()
    shipped = set(zipfile.ZipFile(wheel).namelist())
    for package in ("autotune", "autotune_pytest"):
        folders = os.walk(floors.ROOT / package, followlinks=True)
        files = {
            (Path(folder) / name).relative_to(floors.ROOT).as_posix() for folder, _, names in folders for name in names
        }
        assert {file for file in files if "__pycache__" not in file} <= shipped
