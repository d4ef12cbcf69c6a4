"""The door through which transforms come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest

from autotune import transforms
from autotune.errors import AutotuneError, Blocker, ChoiceError, TransformError
from autotune.machine.hardware import Hardware
from autotune.model.seam import cannot_step
from autotune.runtime.variant import Stage, Transform
from autotune.transforms import make, registry
from autotune.transforms.compile_step import no_compiler
from autotune.transforms.weight_only import WeightOnly


@dataclass(frozen=True)
class Doubled(Transform):
    name: ClassVar[str] = "doubled"
    stage: ClassVar[Stage] = Stage.LOOP
    summary: ClassVar[str] = "a plug-in"


@dataclass(frozen=True)
class OtherThreads(Transform):
    name: ClassVar[str] = "threads"
    stage: ClassVar[Stage] = Stage.THREADS
    summary: ClassVar[str] = "a plug-in that overrides"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Entry points by value; what they load to is a class, or an exception they raise."""
    loaded: dict[str, object] = {}

    def load(point: EntryPoint) -> object:
        if isinstance(found := loaded[point.value], Exception):
            raise found
        return found

    def points(group: str) -> list[EntryPoint]:
        return [EntryPoint(value.split(":")[-1], value, group) for value in loaded]

    monkeypatch.setattr(transforms, "entry_points", points)
    monkeypatch.setattr(EntryPoint, "load", load)
    registry.cache_clear()
    yield loaded
    registry.cache_clear()


def test_built_ins_are_found() -> None:
    expected = {"attention", "bitsandbytes", "dynamic_int8", "linear_dtype", "threads", "torchao", "weight_only"}
    assert expected <= registry().keys()
    assert registry()["weight_only"] is WeightOnly
    with pytest.raises(TypeError):
        registry()["threads"] = OtherThreads


def test_plugin_is_found(plugins: dict[str, object]) -> None:
    plugins["package:Doubled"] = Doubled
    assert make("doubled", {}, "decode") == Doubled("decode")


def test_broken_plugins_are_left_out_and_named(plugins: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    plugins["missing:A"], plugins["shy:B"] = ImportError("no module named 'missing'"), Transform
    assert {"A", "B"}.isdisjoint(registry())
    assert "missing:A" in caplog.text
    assert "no module named 'missing'" in caplog.text
    assert "shy:B" in caplog.text


def test_override_names_both(plugins: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    plugins["package:OtherThreads"] = OtherThreads
    assert registry()["threads"] is OtherThreads
    assert "package:OtherThreads" in caplog.text
    assert "autotune.transforms.threads" in caplog.text


@pytest.mark.parametrize(
    ("name", "params", "phase", "says"),
    [
        ("weight_onyl", {}, "both", "did you mean 'weight_only'?"),
        ("magic", {}, "both", "expected one of attention"),
        ("weight_only", {"bist": 8}, "both", "did you mean 'bits'?"),
        ("weight_only", {"phase": "decode"}, "both", "no parameter 'phase'"),
        ("weight_only", {"bits": 3}, "both", "bits is 3; expected one of 4, 6, 8"),
        ("weight_only", {"bits": "8"}, "both", "bits must be int, not '8'"),
        ("weight_only", {"bits": True}, "both", "bits must be int, not True"),
        ("weight_only", {}, "decoding", "did you mean 'decode'?"),
        ("weight_storage", {"dtype": "float61"}, "both", "did you mean 'float16'?"),
        ("threads", {"count": 0}, "both", "at least 1, not 0"),
        ("torchao", {"scheme": "int8"}, "both", "scheme is 'int8'"),
    ],
)
def test_mistakes_are_named(name: str, params: dict[str, Any], phase: str, says: str) -> None:
    with pytest.raises(ChoiceError) as caught:
        make(name, params, phase)
    assert says in str(caught.value)


def test_a_choice_error_is_a_transform_error() -> None:
    assert issubclass(ChoiceError, (TransformError, ValueError))
    assert issubclass(ChoiceError, AutotuneError)


def test_a_transform_is_a_value() -> None:
    transform = make("weight_only", {"bits": 4}, "decode")
    assert transform == make("weight_only", {"bits": 4, "group": 32}, "decode")
    assert str(transform) == "weight_only(bits=4, group=32)@decode"
    with pytest.raises(FrozenInstanceError):
        transform.phase = "both"
    assert make(transform.name, transform.params, transform.phase) == transform


def known(self: Any, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> None: ...


def renamed(self: Any, input_ids: Any, attention_mask: Any, position_ids: Any, memory: Any) -> None: ...


def state_space(self: Any, input_ids: Any, attention_mask: Any, cache_params: Any) -> None: ...


@pytest.mark.parametrize(
    ("forward", "reason", "blocks"),
    [
        (known, None, False),
        (renamed, "the model's forward does not take cache that is known by name", True),
        (state_space, "the model's forward does not take position_ids", False),
    ],
    ids=["known", "renamed", "state space"],
)
def test_a_model_with_positions_whose_cache_has_another_name_is_a_blocker(
    forward: Any, reason: str | None, blocks: bool
) -> None:
    found = cannot_step(type("Model", (), {"forward": forward})())
    assert (found, isinstance(found, Blocker)) == (reason, blocks)


def test_a_missing_compiler_is_a_blocker() -> None:
    cpu = Hardware("cpu", "test", "AVX2", 2, 1 << 34, 25e9, {"float32": 140e9}, None, {})
    assert isinstance(no_compiler(cpu), Blocker)
    assert no_compiler(replace(cpu, compiler="g++ 13")) is None
