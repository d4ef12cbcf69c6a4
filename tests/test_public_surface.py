"""What users may rely on: the names at the top level, and the arguments of `wrap`."""

from __future__ import annotations

import inspect
from importlib import metadata, resources

import pytest

import autotune
from autotune import errors
from autotune.tune import policy

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
HANDLE = ["commit", "events", "plan", "report", "rollback", "status", "tune", "unwrap"]


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


def test_every_error_is_an_autotune_error_and_drawn_in_the_tree() -> None:
    raised = [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, BaseException)]
    assert len(raised) > 5
    for error in raised:
        assert issubclass(error, errors.AutotuneError)
        assert error.__name__ in str(errors.__doc__), f"{error.__name__} is missing from the tree"


def test_the_version_is_that_of_the_distribution() -> None:
    assert autotune.__version__ == metadata.version("autotune-inference")


def test_types_and_policies_are_shipped() -> None:
    package = resources.files("autotune")
    assert package.joinpath("py.typed").is_file()
    shipped = {file.name for file in package.joinpath("tune", "policies").iterdir() if file.name.endswith(".toml")}
    assert shipped == {f"{name}.toml" for name in ("balanced", "latency", "throughput", "memory", "lossless")}
    assert {"balanced", "lossless"} <= set(policy.available())
