"""What users may rely on: the names at the top level, and the arguments of `wrap`."""

from __future__ import annotations

import importlib
import inspect
from importlib import metadata, resources

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


def test_types_and_policies_are_shipped() -> None:
    package = resources.files("autotune")
    assert package.joinpath("py.typed").is_file()
    shipped = {file.name for file in package.joinpath("tune", "policies").iterdir() if file.name.endswith(".toml")}
    assert shipped == {f"{name}.toml" for name in ("balanced", "latency", "throughput", "memory", "lossless")}
    assert {"balanced", "lossless"} <= set(policy.available())
