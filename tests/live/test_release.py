"""The original let go: its weights are freed, the plan serves on, and what it cannot serve still runs."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import autotune
from autotune.model import seam
from autotune.model.linear_layers import stored_bytes
from autotune.runtime.kernels import PackedLinear, available
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.compile_step import CompileStep
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.linear_dtype import LinearDtype
from autotune.transforms.packed_embedding import PackedEmbedding
from autotune.transforms.static_cache import StaticCache
from autotune.transforms.step_program import StepProgram
from autotune.transforms.weight_only import WeightOnly
from autotune.tune import plan as plans
from autotune.tune import policy as policies
from autotune.tune import run as tuning
from autotune.tune.bench import LiveBench
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.tuned import Tuned
from autotune.validate.latency import decide
from autotune.validate.limits import Limits
from autotune.validate.timing import Pair, Timing
from autotune.workload import Workload
from tests.models import left_padded, tiny, token_prompts

SENTENCE = available()
pytestmark = pytest.mark.skipif(SENTENCE is not None, reason=str(SENTENCE))

IDS = torch.tensor(token_prompts(1))
PACKED: list[Transform] = [WeightOnly(bits=8), PackedEmbedding(), StaticCache(slots=128)]


class Written:
    """A report that only knows whether the original is kept."""

    bytes_after_release: int | None = None

    def with_calls(self, served: int, bypassed: dict[str, int]) -> Written:
        return self

    def without_original(self, weights_bytes: int | None) -> Written:
        written = Written()
        written.bytes_after_release = weights_bytes
        return written


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[Transform]:
    """Tuning that always ends with the transforms in the list, and measures nothing: what is tested is the serving."""
    wanted = list(PACKED)

    def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        variant = Variant(model, traffic, workload).with_transforms(wanted)
        none = Fingerprint("", "", {}, "", "", "strict")
        return Tuned(variant, plans.Plan(none, variant.transforms), Written(), "won")

    monkeypatch.setattr(tuning, "tune", tune)
    return wanted


def greedy(model: Any, ids: torch.Tensor = IDS, tokens: int = 8, **options: Any) -> list[list[int]]:
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, **options).tolist()


def wrapped(model: Any, **options: Any) -> Any:
    return autotune.wrap(model, **({"workload": token_prompts(4), "when": "blocking", "cache": False} | options))


def released(model: Any = None) -> Any:
    model = wrapped(tiny("llama") if model is None else model)
    model.autotune.commit(keep_original=False)
    return model


def storages(model: torch.nn.Module) -> dict[str, int]:
    """Where each parameter's data lie, by name."""
    return {name: p.untyped_storage().data_ptr() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gpt2", "gpt-neox", "opt", "mistral-window", "mixtral", "phi3", "gemma3"]
)
def test_weights_that_the_plan_does_not_use_are_freed_and_it_answers_the_same(
    scripted: list[Transform], architecture: str
) -> None:
    if architecture == "gemma3":  # scales what its embedding looks up
        scripted.remove(PackedEmbedding())
    model = wrapped(tiny(architecture))
    padded = left_padded()
    before = greedy(model), greedy(model, padded["input_ids"], attention_mask=padded["attention_mask"])
    serving = model.autotune._winner.tuned.variant.modules
    used = {id(p) for module in serving.values() for p in module.parameters()}
    unused = [weakref.ref(p) for p in model.parameters() if id(p) not in used]
    layers = [weakref.ref(m) for m in model.modules() if m is not model]
    plan_bytes = stored_bytes(*serving.values())
    assert unused

    model.autotune.commit(keep_original=False)
    gc.collect()
    assert not [p for p in unused if p() is not None]
    assert not [m for m in layers if m() is not None]
    assert stored_bytes(model, *serving.values()) == plan_bytes
    assert (greedy(model), greedy(model, padded["input_ids"], attention_mask=padded["attention_mask"])) == before
    assert model.autotune.status.state == "tuned"
    assert model.autotune.status.original == "released"
    assert model.autotune.report().bytes_after_release == plan_bytes


def test_recorded_steps_follow_their_weights(scripted: list[Transform]) -> None:
    """What is left of the original moves to memory of its own; programs hold addresses, so they are recorded anew."""
    scripted[:] = [WeightOnly(bits=8), PackedEmbedding(), StepProgram(phase="decode")]
    model, padded = wrapped(tiny("llama")), left_padded()
    before = greedy(model), greedy(model, padded["input_ids"], attention_mask=padded["attention_mask"])
    step = model.autotune._winner.tuned.variant.step
    shapes, programs = step.shapes, step.programs
    model.autotune.commit(keep_original=False)
    assert step.shapes == shapes, "at once, not while the first request waits"
    assert not set(map(id, step.programs)) & set(map(id, programs))
    gc.collect()
    torch.empty(1 << 20).fill_(torch.nan)  # what is read where weights were freed would show
    assert (greedy(model), greedy(model, padded["input_ids"], attention_mask=padded["attention_mask"])) == before


def test_freed_after_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that tuning leaves behind (exam with its logits, bench, profile) holds on to the original."""
    judged: list[Any] = []

    def search(original: Variant, policy: Any, hardware: Any, bench: Any, **_: Any) -> Variant:
        variant = original.with_transforms(PACKED)
        bench.exams.to_choose = bench.exams.prepare(bench.tuning, (), "brief")  # a quick one takes half a minute
        judged.append(bench.judge(variant, "aggressive"))
        bench.first_speedup(original, variant, "decode")
        bench.profile(variant)
        return variant

    def conclude(variant: Any, bench: Any, identity: Any, start: float, meter: Any) -> Any:
        return Tuned(variant, plans.Plan(identity, variant.transforms), Written(), "won")

    monkeypatch.setattr(tuning, "search", search)
    monkeypatch.setattr(tuning, "conclude", conclude)
    model = wrapped(tiny("llama"), workload=token_prompts(40, length=24), when="manual")
    weights = [weakref.ref(p) for p in model.parameters() if p.dim() > 1]
    model.autotune.tune(token_prompts(40, length=24))
    assert judged[0].tokens
    model.autotune.commit(keep_original=False)
    gc.collect()
    assert not [p for p in weights if p() is not None]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"tokens": 200},
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
    ids=["beams", "no cache", "long", "attentions"],
)
def test_what_the_plan_cannot_serve_runs_through_its_layers(scripted: list[Transform], options: dict[str, Any]) -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")  # attentions can be asked for
    twin = copy.deepcopy(Variant(model).with_transforms(PACKED[:2]).modules["prefill"])
    expected = twin.generate(IDS, **({"max_new_tokens": options.get("tokens", 8), "do_sample": False} | rest(options)))
    released(model)
    found = model.generate(IDS, **({"max_new_tokens": options.get("tokens", 8), "do_sample": False} | rest(options)))
    tokens = [out if isinstance(out, torch.Tensor) else out.sequences for out in (found, expected)]
    assert torch.equal(*tokens)
    assert model.autotune.status.served == 0
    assert sum(model.autotune.status.bypassed.values()) == 1
    assert model.autotune.status.state == "tuned"


def rest(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "tokens"}


def test_forward_with_gradients_or_a_cache_of_the_callers_still_runs(scripted: list[Transform]) -> None:
    from transformers import DynamicCache

    model = released()
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected)  # gradients are on
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        steps = [model(IDS[:, k : k + 1], **seam.over(model, cache)).logits for k in range(IDS.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-3, atol=2e-3)  # packed layers round their inputs


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda m: m.autotune.rollback(), "cannot roll back: the original's weights were released; load the model"),
        (lambda m: m.autotune.unwrap(), "cannot unwrap: .* load the model again"),
        (lambda m: m.autotune.tune(), "cannot tune again: .* load the model again"),
        (wrapped, "cannot unwrap: .* load the model again"),
        (lambda m: m.state_dict(), "no weights of its own to save"),
        (lambda m: m.load_state_dict(tiny("llama").state_dict()), "no weights of its own to save or to load into"),
        (lambda m: copy.deepcopy(m).state_dict(), "no weights of its own"),
    ],
    ids=["rollback", "unwrap", "tune", "wrap", "state_dict", "load_state_dict", "copy"],
)
def test_what_needs_the_original_is_refused_with_what_to_do(scripted: list[Transform], ask: Any, said: str) -> None:
    model = released()
    before = greedy(model)
    with pytest.raises(autotune.StateError, match=said):
        ask(model)
    assert greedy(model) == before
    assert model.autotune.status.state == "tuned"


def test_a_released_model_is_not_saved(scripted: list[Transform], tmp_path: Any) -> None:
    model = released()
    with pytest.raises(autotune.StateError, match="no weights of its own to save"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))


def test_the_model_shows_what_it_consists_of(scripted: list[Transform]) -> None:
    model = tiny("llama")
    cls, config = type(model), model.config
    wrapped(model, keep_original=False)
    assert isinstance(model, cls)
    assert (model.config, model.device, model.dtype) == (config, torch.device("cpu"), torch.float32)
    assert "Int8Linear" in repr(model)
    assert "PackedTable" in repr(model)
    assert {p.dim() for p in model.parameters()} == {1}  # norms
    assert any(isinstance(m, PackedLinear) for m in model.modules())
    model.to("cpu").eval()
    greedy(model)
    assert model.autotune.status.state == "tuned"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.train(), "training mode"),
        (lambda m: m.to(torch.bfloat16), "tensor scales of model.embed_tokens was replaced"),
        (lambda m: m.set_submodule("model.norm", torch.nn.LayerNorm(64)), "was replaced"),
    ],
    ids=["train", "to", "module"],
)
def test_a_change_after_the_release_drops_the_plan(scripted: list[Transform], change: Any, said: str) -> None:
    model = released()
    change(model)
    with pytest.warns(RuntimeWarning, match=f"{said}.*; the plan's layers serve .*; .* load the model again"):
        assert len(greedy(model)[0]) == IDS.shape[1] + 8
    assert model.autotune.status.state == "stale"
    with pytest.raises(autotune.StateError, match=r"stale: .* load the model again"):
        model.autotune.commit()


def test_a_plan_that_fails_leaves_its_layers_to_serve(scripted: list[Transform]) -> None:
    model = released()
    before = greedy(model)
    model.autotune._serving.active.modules["decode"].forward = lambda *_, **__: 1 / 0
    with pytest.warns(RuntimeWarning, match="the plan failed: .*; the plan's layers serve"):
        assert greedy(model) == before
    assert model.autotune.status.state == "failed"
    assert greedy(model) == before


@pytest.mark.parametrize(
    "transforms",
    [[], [LeanLoop()], [StaticCache()], [WeightOnly(bits=8, phase="decode"), StaticCache()]],
    ids=["nothing", "lean loop", "static cache", "prefill uses the original"],
)
def test_a_plan_that_uses_all_of_the_original_releases_nothing(
    scripted: list[Transform], transforms: list[Transform]
) -> None:
    scripted[:] = transforms
    model = tiny("llama")
    where = storages(model)
    released(model)
    assert model.autotune.status.original == "resident"
    assert storages(model) == where
    model.autotune.unwrap().state_dict()


def test_phases_with_weights_of_their_own(scripted: list[Transform]) -> None:
    scripted[:] = [WeightOnly(bits=8, phase="decode"), LinearDtype(dtype="bfloat16", phase="prefill"), StaticCache()]
    model = wrapped(tiny("llama"))
    before = greedy(model)
    model.autotune.commit(keep_original=False)
    assert model.autotune.status.original == "released"
    assert greedy(model) == before
    assert len(greedy(model, num_beams=2)[0]) == IDS.shape[1] + 8


def test_released_twice_and_committed_again(scripted: list[Transform]) -> None:
    model = released()
    before = greedy(model)
    model.autotune.commit(keep_original=False)
    model.autotune.commit()
    assert greedy(model) == before


def test_an_unwrapped_model_keeps_its_weights(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"))
    handle, where = model.autotune, storages(model)
    handle.unwrap()
    with pytest.raises(autotune.StateError, match="unwrapped"):
        handle.commit(keep_original=False)
    assert storages(model) == where


@pytest.mark.parametrize(
    ("objective", "transforms", "least"),
    [
        ("memory", [WeightOnly(bits=8), PackedEmbedding()], -1.0),
        ("memory", [LeanLoop()], 0.0),  # saves no memory, so it has to gain time
        ("latency", [WeightOnly(bits=8), PackedEmbedding()], 0.0),
    ],
    ids=["less memory", "the same memory", "another objective"],
)
def test_what_saves_memory_has_to_gain_no_time_where_memory_is_the_objective(
    objective: str, transforms: list[Transform], least: float
) -> None:
    original = Variant(tiny("llama"))
    policy = replace(policies.load("memory"), objective=objective)
    work = Workload(tuple(map(tuple, token_prompts(8))))
    bench = LiveBench(original, work, policy, Any, notify=str)  # nothing is measured
    limits = bench.races.limits(original, original.with_transforms(transforms))
    assert limits == replace(policy.limits, min_gain=least)


@pytest.mark.parametrize(
    ("tpot_s", "verdict", "said"),
    [(0.03, "pass", "within the limits"), (0.031, "pass", "within the limits"), (0.04, "fail", "over the limit")],
)
def test_a_negative_least_gain_leaves_the_limits_to_decide(tpot_s: float, verdict: str, said: str) -> None:
    pairs = [Pair(Timing(0.1, 0.03, 1.0), Timing(0.1, tpot_s, 1.0))] * 8
    found = decide({"a": pairs}, "tpot", Limits(min_gain=-1.0), 0.01)
    assert (found.verdict, said in found.reason) == (verdict, True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of a process's mappings here")
@pytest.mark.parametrize(
    ("architecture", "step"),
    [
        ("llama", []),
        ("opt", []),  # biases
        ("gpt2", []),  # and Conv1D
        pytest.param("llama", [CompileStep(phase="decode")], marks=pytest.mark.slow),
    ],
    ids=["llama", "opt", "gpt2", "compiled step"],
)
def test_the_checkpoint_is_no_longer_mapped(
    scripted: list[Transform], architecture: str, step: list[Transform], tmp_path: Path
) -> None:
    scripted += step
    tiny(architecture).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    wrapped(model)
    before = greedy(model)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    model.autotune.commit(keep_original=False)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert greedy(model) == before
    assert model.autotune.status.state == "tuned"
