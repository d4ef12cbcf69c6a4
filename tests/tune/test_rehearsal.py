"""What an architecture does not bear is refused before it is tried, for what a tiny model of its class shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from autotune.errors import Blocker, TransformError
from autotune.machine import hardware, versions
from autotune.model import seam, shrink
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.transforms import make
from autotune.tune import choose, rehearsal
from tests import architectures
from tests.models import tiny

if TYPE_CHECKING:
    from autotune.machine.hardware import Hardware

REFUSED = [
    ("gpt_neo", "static_cache", "decode", "gives other tokens"),
    ("falcon, ALiBi", "static_cache", "decode", "ValueError"),
    ("falcon", "prefill_attention", "prefill", "does not take other attention"),
    ("minimax", "lean_loop", "decode", "cache of its own"),
    ("mixtral", "step_program", "decode", "cannot be recorded"),
    ("axk2", "prefill_attention", "prefill", "gives other tokens"),
]


@pytest.fixture(scope="module")
def machine() -> Hardware:
    return hardware.probe("cpu")


@pytest.mark.parametrize(("name", "transform", "phase", "said"), REFUSED)
def test_what_an_architecture_does_not_bear_is_refused_beforehand(
    name: str, transform: str, phase: str, said: str, machine: Hardware
) -> None:
    if name not in architectures.VARIANTS and name not in seam.causal_lms():
        pytest.skip(f"this release of transformers has no {name}")
    reason = choose.unavailable(make(transform, {}, phase), Variant(architectures.built(name)), machine)
    assert reason is not None
    assert said in reason


@pytest.mark.parametrize("transform", ["lean_loop", "static_cache", "step_program", "one_query_attention"])
def test_what_it_bears_is_not(transform: str, machine: Hardware) -> None:
    assert rehearsal.obstacle(tiny(), make(transform, {}, "decode"), machine) is None


@dataclass(frozen=True)
class Scripted(Transform):
    """Breaks in one way or another."""

    how: str = ""
    name: ClassVar[str] = "scripted"
    stage: ClassVar[Stage] = Stage.LAYERS
    lossless: ClassVar[bool] = True

    def rehearsed(self) -> Transform | None:
        return None if self.how == "unrehearsed" else self

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        return "not here" if self.how == "unavailable" else None

    def took_effect(self, variant: Variant) -> str | None:
        return "no damage" if self.how == "nothing" else None

    def apply(self, variant: Variant) -> None:
        if self.how == "refuses":
            raise TransformError("it refuses")
        if self.how == "raises":
            raise KeyError("a layer")
        for module in variant.edit("both"):
            if self.how == "damages":
                layers: Any = module
                layers.lm_head = type(layers.lm_head)(64, shrink.VOCABULARY, bias=False)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("refuses", "it refuses"),
        ("raises", "raises KeyError with it: 'a layer'"),
        ("nothing", "on a tiny LlamaForCausalLM it has no effect: no damage"),
        ("damages", "a tiny LlamaForCausalLM gives other tokens with it"),
        ("unavailable", None),
        ("unrehearsed", None),
        ("", None),
    ],
)
def test_what_a_rehearsal_says(how: str, said: str | None, machine: Hardware) -> None:
    found = rehearsal.obstacle(tiny(), Scripted(how=how), machine)
    assert (found is None) == (said is None)
    assert said is None or said in (found or "")


@pytest.mark.parametrize("version", ["5.24.1", "6.0.0"])
def test_with_another_release_it_may_be_the_releases_fault(
    version: str, machine: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    untested = {} if version == "5.24.1" else {"transformers": version}
    monkeypatch.setattr(versions, "untested", lambda: untested)
    monkeypatch.setattr(rehearsal, "_found", {})
    found = rehearsal.obstacle(tiny(), Scripted(how="raises"), machine)
    assert isinstance(found, Blocker) == bool(untested)
    assert ("; transformers 6.0.0 was not tested" in (found or "")) == bool(untested)
    assert rehearsal.obstacle(tiny(), Scripted(), machine) is None


def test_it_is_found_once_for_a_configuration(machine: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lean = tiny(rope_theta=12345.0), make("lean_loop", {}, "decode")
    made = []
    shrunk = shrink.shrunk
    monkeypatch.setattr(shrink, "shrunk", lambda each: made.append(each) or shrunk(each))
    for _ in range(2):
        assert rehearsal.obstacle(model, lean, machine) is None
    assert made == [model]
    assert rehearsal.obstacle(tiny(rope_theta=54321.0), lean, machine) is None
    assert len(made) == 2


@pytest.mark.parametrize("shrunk", [None, "a model that cannot answer"])
def test_what_cannot_be_shrunk_is_left_to_the_gate(
    shrunk: Any, machine: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrink, "shrunk", lambda _: shrunk)
    monkeypatch.setattr(rehearsal, "_models", {})
    monkeypatch.setattr(rehearsal, "_found", {})
    assert rehearsal.obstacle(architectures.built("gpt_neo"), make("static_cache", {}, "decode"), machine) is None
