"""Models that write their own buffers: found, shared, put back after measuring, and right at every length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from autotune import transforms
from autotune.errors import TransformError
from autotune.machine import hardware
from autotune.model import stateful
from autotune.model.revision import Revision
from autotune.model.route import routed
from autotune.model.seam.preparation import drops_cache
from autotune.model.twins import fork
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.tune import choose, fingerprint
from tests.architectures import Fallback
from tests.models import tiny, token_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SWITCH = 64  # tokens
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0, 3.0, 6.0, 2.0, 8.0, 5.0, 7.0, 9.0],
    "original_max_position_embeddings": SWITCH,
    "factor": 4.0,
    "rope_theta": 10000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 with longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": SWITCH}),
    "llama with longrope": ("llama", {"rope_parameters": LONG}),
    "llama with dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH}),
}
OTHERS = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SWITCH},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": SWITCH,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
PLANS: dict[str, list[tuple[str, dict[str, Any], Any]]] = {
    "lean loop": [("lean_loop", {}, "decode")],
    "slots": [("static_cache", {}, "decode")],
    "own loop": [("fused_layers", {}, "prefill")],
    "program": [("step_program", {}, "decode")],
    "all": [("fused_layers", {}, "prefill"), ("step_program", {}, "decode")],
}
ROTARY = "model.rotary_emb"
REQUESTS = [(12, 8), *((n, 6) for n in range(SWITCH - 6, SWITCH + 4)), (100, 4), (80, 4), (50, 30), (66, 3), (12, 8)]


def made(kind: str) -> Any:
    name, changes = MODELS[kind]
    return tiny(name, **changes)


def planned(model: PreTrainedModel, plan: str) -> Any:
    chosen = [transforms.make(name, params, phase) for name, params, phase in PLANS[plan]]
    return routed(model, Fallback(Variant(model).with_transforms(chosen)))


def answers(model: Any, length: int, new: int) -> list[int]:
    ids = torch.tensor(token_prompts(1, length, seed=length))
    found: list[int] = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)[0, length:].tolist()
    return found


def held(model: Any) -> list[Any]:
    rotary = model.get_submodule(ROTARY)
    values = {**vars(rotary), **rotary._buffers}
    return [v.tolist() if isinstance(v, torch.Tensor) else v for k, v in sorted(values.items()) if k[0] != "_"]


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_forward_writes_is_found(kind: str) -> None:
    state = stateful.of(made(kind))
    assert list(state.modules) == [ROTARY]
    assert state.writes(ROTARY, "inv_freq")
    assert not state.writes(ROTARY, "original_inv_freq")
    assert not state.alien


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_written_once_is_no_state(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **OTHERS[kind]}
    assert stateful.of(tiny("llama", rope_parameters=rope)) == stateful.NOTHING


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_plan_answers_as_the_model_at_every_length(kind: str, plan: str) -> None:
    plain, served = made(kind), planned(made(kind), plan)
    for length, new in REQUESTS:
        assert answers(served, length, new) == answers(plain, length, new), (length, new)


@pytest.mark.parametrize("kind", MODELS)
def test_a_padded_batch_crosses_the_switch(kind: str) -> None:
    plain, served = made(kind), planned(made(kind), "lean loop")
    ids = torch.tensor(token_prompts(2, SWITCH - 2))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    how = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(served.generate(ids, **how), plain.generate(ids, **how))


def test_twins_share_the_state() -> None:
    model = made("llama with dynamic")
    stateful.of(model)
    twin = fork(model)
    assert twin.get_submodule(ROTARY) is model.get_submodule(ROTARY)
    assert twin.get_submodule("model.norm") is not model.get_submodule("model.norm")


@pytest.mark.parametrize("kind", MODELS)
def test_measuring_leaves_no_state_behind(kind: str) -> None:
    model = made(kind)
    model(torch.tensor(token_prompts(1, 3)))
    before = held(model)
    Variant(model).with_transform(transforms.make("step_program", {}, "decode"))
    assert held(model) == before
    answers(serving(Variant(model).with_transform(transforms.make("lean_loop", {}, "decode"))), SWITCH + 10, 4)
    assert held(model) == before
    answers(model, SWITCH + 10, 4)
    assert held(model) != before


@pytest.mark.parametrize("kind", MODELS)
def test_a_revision_looks_past_what_the_model_writes_and_sees_what_others_do(kind: str) -> None:
    model = made(kind)
    revision, identity = Revision(model), fingerprint.of_model(model)
    for length in (5, SWITCH + 6, SWITCH + 3, 5):
        answers(model, length, 2)
        assert revision.look_closer() is None
        assert fingerprint.of_model(model) == identity
    rotary: Any = model.get_submodule(ROTARY)
    rotary.original_inv_freq.mul_(2.0)
    assert "original_inv_freq" in (revision.changed() or "")
    rotary.original_inv_freq.div_(2.0)
    revision = Revision(model)
    rotary.attention_scaling = 0.5
    assert "attention_scaling" in (revision.changed() or "")


def test_a_users_change_of_what_is_shared_holds_for_the_plan() -> None:
    plain, model = made("llama with dynamic"), made("llama with dynamic")
    served = planned(model, "program")
    before = answers(served, 12, 8)
    for each in (plain, model):
        each.get_submodule(ROTARY).inv_freq.mul_(3.0)
    assert answers(served, 12, 8) == answers(plain, 12, 8) != before


def test_what_keeps_a_value_refuses() -> None:
    model = made("phi3 with longrope")
    for name, phase in (("compile_step", "decode"), ("cuda_graph", "decode"), ("compile_prefill", "prefill")):
        transform = transforms.make(name, {}, phase)
        with pytest.raises(TransformError, match=f"{ROTARY} computes its buffers anew|no graphs"):
            Variant(model).with_transform(transform)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("name", "phase"), [("continuous_batching", "decode"), ("prefill_parts", "prefill")])
def test_what_mixes_lengths_refuses(kind: str, name: str, phase: Any) -> None:
    """A part of a prompt, or a sequence beside a longer one, would get the frequencies of another length."""
    recorded = Variant(made(kind)).with_transform(transforms.make("step_program", {}, "decode"))
    with pytest.raises(TransformError, match=f"{ROTARY} computes its buffers anew as contexts grow"):
        recorded.with_transform(transforms.make(name, {}, phase))


class Counting(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) / self.calls


def test_a_layer_with_weights_that_changes_itself_is_no_plans() -> None:
    model = tiny()
    model.lm_head.__class__ = Counting
    assert stateful.of(model).alien == ("lm_head.calls",)
    lean = transforms.make("lean_loop", {}, "decode")
    reason = choose.unavailable(lean, Variant(model), hardware.probe("cpu"))
    assert reason is not None
    assert "lm_head.calls" in reason
    with pytest.raises(TransformError, match=r"lm_head\.calls"):
        Variant(model).with_transform(lean)


def test_a_model_that_cannot_be_asked_has_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(type(model), "forward", lambda self, **given: given["missing"])
    assert stateful.of(model) == stateful.NOTHING


def test_where_the_cache_is_dropped() -> None:
    phi, llama = made("phi3 with longrope"), made("llama with longrope")
    assert [n for n in range(SWITCH - 4, SWITCH + 4) if drops_cache(phi, n - 1, n)] == [SWITCH + 1]
    assert drops_cache(phi, 10, 4 * SWITCH)
    assert not drops_cache(phi, SWITCH + 1, 4 * SWITCH)
    assert not any(drops_cache(llama, n - 1, n) for n in range(SWITCH - 4, SWITCH + 4))
