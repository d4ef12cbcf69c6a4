"""When decode guesses ahead, what it promises, and how it goes with other transforms."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

import autotune
from autotune.diagnose.costs import PhaseProfile, Profile
from autotune.errors import ChoiceError, TransformError
from autotune.machine import device
from autotune.runtime import kernels
from autotune.runtime.cache import slot_forward, slots
from autotune.runtime.dispatch import serving
from autotune.runtime.speculation import speculate
from autotune.runtime.speculation.pace import evenly
from autotune.runtime.steps.compiled import CompiledStep
from autotune.runtime.steps.inductor_graphs import InductorGraphStep
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.transforms import make
from autotune.transforms.compile_step import CompileStep
from autotune.transforms.cuda_graph import CudaGraph
from autotune.transforms.quantised_cache import QuantisedCache
from autotune.transforms.speculation import Speculation
from autotune.transforms.static_cache import StaticCache
from autotune.transforms.step_program import StepProgram
from autotune.transforms.threads import Threads
from autotune.tune.tuned import Tuned
from autotune.workload import Workload
from tests.fakes.cuda import FakeCuda
from tests.models import tiny, token_prompts
from tests.runtime.test_loop import ask, same
from tests.runtime.test_speculate import RANDOM, REPEATING, Copying
from tests.transforms.test_contract import COMPILER

PROMPT, MODEL = Speculation("decode", "prompt", 5), Speculation("decode", "model", 5)


@pytest.mark.parametrize(
    ("transform", "arch", "plan", "batches", "says"),
    [
        (PROMPT, "llama", [], (1,), None),
        (PROMPT, "llama", [StaticCache()], (1, 4), None),
        (MODEL, "llama", [], (1,), "autotune.wrap(model, draft=...)"),
        (PROMPT, "llama", [QuantisedCache("decode")], (1,), "the KV cache is stored in int8"),
        (PROMPT, "llama", [PROMPT], (1,), "guesses ahead already"),
        (PROMPT, "llama", [], (2, 8), "batches of 2, 8"),
        (PROMPT, "mamba", [], (1,), "position_ids"),
    ],
)
def test_unavailable(
    transform: Speculation, arch: str, plan: list[Transform], batches: tuple[int, ...], says: str | None
) -> None:
    model = tiny(arch)
    work = Workload(tuple(map(tuple, token_prompts(4))), 12, batches)
    reason = transform.unavailable(Variant(model, workload=work).with_transforms(plan), COMPILER)
    assert reason is None if says is None else says in (reason or "")


def test_a_draft_is_needed_to_apply() -> None:
    with pytest.raises(TransformError, match="no draft model"):
        Variant(tiny()).with_transforms([MODEL])
    variant = Variant(tiny(), draft=tiny(seed=1))
    assert MODEL.unavailable(variant, COMPILER) is None
    made = variant.with_transform(MODEL).speculation
    assert made is not None
    assert made.draft is not None
    assert made.draft[0].module is variant.draft


@pytest.mark.parametrize(
    ("params", "phase", "says"),
    [
        ({"draft": "promt"}, "decode", "did you mean 'prompt'"),
        ({"tokens": 0}, "decode", "1 to 32"),
        ({"tokens": 33}, "decode", "1 to 32"),
        ({}, "both", "phase must be 'decode'"),
    ],
)
def test_parameters_that_make_no_sense(params: dict[str, Any], phase: str, says: str) -> None:
    with pytest.raises(ChoiceError, match=says):
        make("speculation", params, phase)


@pytest.mark.parametrize(
    ("flops", "batch", "speedup"),
    [
        (1e9, 1, 6.0),  # 6 tokens take 6 GFLOP, 0.6 ms at 10 TFLOP/s, within the 10 ms of one step
        (30e9, 1, 6 * 10 / 18),  # 180 GFLOP take 18 ms
        (80e9, 1, 6 * 10 / 48),
        (80e9, 8, 6.0),  # what was counted were eight sequences, what speculates is one
    ],
)
def test_at_best_as_many_tokens_as_their_flops_take_time_for(flops: float, batch: int, speedup: float) -> None:
    decode = PhaseProfile("decode", (0.01,), flops, 1e9, 1e6, 0.9, "float16", 0.009, 0.001, 100, 0.0, ())
    profile = Profile({"decode": decode}, (), (), None, 100, batch)
    machine = replace(COMPILER, bandwidth_bytes_per_s=1e11, flops_per_s={"float16": 1e13})
    assert PROMPT.predict(profile, machine) == {"decode": pytest.approx(speedup)}


def test_a_step_that_cannot_pay_has_no_effect() -> None:
    variant = Variant(tiny()).with_transforms([PROMPT])
    assert PROMPT.took_effect(variant) is None
    assert variant.speculation is not None
    variant.speculation.costs = evenly(variant.speculation.tokens, 7.5)
    assert "5 of them takes 7.5x as long as a plain one" in (PROMPT.took_effect(variant) or "")
    same(ask(serving(variant), REPEATING), ask(variant.original, REPEATING))
    assert variant.speculation.tally == speculate.GuessCounts()
    assert "guesses nothing" in (PROMPT.took_effect(Variant(tiny())) or "")


@pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
def test_fewer_guesses_than_a_recorded_step_takes_cost_as_much_as_all_of_them() -> None:
    variant = Variant(tiny()).with_transforms([StepProgram("decode", slots=64), Speculation("decode", tokens=5)])
    assert variant.speculation is not None
    one, two, *more = variant.speculation.costs
    assert one == 1.0
    assert more[0] == more[1], "four tokens at once"
    assert more[2] == more[3], "six"
    assert len({two, more[0], more[2]}) == 3, "each is measured"


def test_it_comes_last() -> None:
    """Its cost is measured against the step that serves, with the threads it serves with; batching has no guesses."""
    assert max(set(Stage) - {Stage.BATCHING}) is Stage.SPECULATION
    plan = Variant(tiny()).with_transforms([Threads("decode", 1), PROMPT, StaticCache()]).transforms
    assert [t.name for t in plan] == ["static_cache", "threads", "speculation"]


@pytest.mark.parametrize("draft", [PROMPT, MODEL], ids=str)
def test_a_recorded_step_serves_what_is_not_guessed(draft: Speculation, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := kernels.available():
        pytest.skip(reason)
    model = tiny()
    variant = Variant(model, draft=tiny()).with_transforms([StepProgram("decode"), draft])
    assert variant.speculation is not None
    assert variant.step is not None
    # here a recorded step is many times as fast as the module
    variant.speculation.costs = evenly(variant.speculation.tokens, 1.1)
    recorded, calls = type(variant.step).fitting, []

    def counted(steps: Any, cache: Any) -> Any:
        step = recorded(steps, cache)
        return lambda *arguments: calls.append(1) or step(*arguments)

    monkeypatch.setattr(type(variant.step), "fitting", counted)
    for ids, options in ((REPEATING, {"logits_processor": [Copying()]}), (RANDOM, {})):
        calls.clear()
        before = variant.speculation.tally
        same(ask(serving(variant), ids, max_new_tokens=31, **options), ask(model, ids, max_new_tokens=31, **options))
        after = variant.speculation.tally
        assert len(calls) == 30 - (after.steps - before.steps) - (after.right - before.right)
    assert variant.speculation.tally.right >= 24


@pytest.mark.parametrize("draft", [PROMPT, MODEL], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_where_the_step_is_captured_so_are_guesses_and_their_check(arch: str, draft: Speculation) -> None:
    model, fake = tiny(arch), FakeCuda()
    with device.stand_in(fake):
        graph = CudaGraph(phase="decode", shortest=32)
        variant = Variant(model, draft=tiny(arch)).with_transforms([graph, draft])
        assert variant.speculation is not None
        variant.speculation.costs = evenly(variant.speculation.tokens, 1.1)
        stride, captures = variant.speculation.stride, fake.captures
        assert stride.several is not None
        timed = stride.several.replays  # when it was applied
        for ids, options in ((REPEATING, {"logits_processor": [Copying()]}), (RANDOM, {})):
            for _ in range(2):
                mine = ask(serving(variant), ids, max_new_tokens=60, **options)
                same(mine, ask(model, ids, max_new_tokens=60, **options))
        assert stride.several.replays - timed == variant.speculation.tally.steps > 0
        assert not stride.several.fallbacks
        if variant.speculation.draft is not None:
            one, several = variant.speculation.draft[0].one, variant.speculation.draft[0].several
            assert one is not None
            assert one.replays > 0
            assert several is not None
            assert several.replays > 0
        assert fake.captures == captures
        variant.speculation.forget()
        same(ask(serving(variant), REPEATING), ask(model, REPEATING))


def test_where_the_step_is_compiled_and_captured_so_is_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is noted instead, and runs as it is; a replay on this fake calls it again."""
    prepared, called = set[tuple[int, int]](), Counter[int]()

    def prepare(self: CompiledStep, cache: slots.SlotCache, tokens: int = 1) -> None:
        def compiled(*given: Any) -> torch.Tensor:
            called[tokens] += 1
            return (slot_forward.run if tokens == 1 else slot_forward.forward)(*given)

        prepared.add((cache.shape[1], tokens))
        self._steps[cache.layout, tokens] = compiled

    monkeypatch.setattr(CompiledStep, "prepare", prepare)
    with device.stand_in(FakeCuda(opaque=True)):
        plan = [CompileStep(phase="decode"), CudaGraph(phase="decode", shortest=32), PROMPT]
        variant = Variant(tiny(), workload=Workload(((1, 2, 3),), 100, (1,))).with_transforms(plan)
        assert prepared >= {(slots, tokens) for slots in (128, 256) for tokens in (1, 6)}
        assert variant.speculation is not None
        variant.speculation.costs, several = evenly(variant.speculation.tokens, 1.1), variant.speculation.stride.several
        assert several is not None
        called.clear()
        options = {"logits_processor": [Copying()], "max_new_tokens": 60}
        same(ask(serving(variant), REPEATING, **options), ask(variant.original, REPEATING, **options))
        assert called[6] == variant.speculation.tally.steps > 0
        assert not several.fallbacks


def test_beside_inductors_graphs_the_check_is_captured_too() -> None:
    model = tiny()
    with device.stand_in(FakeCuda()) as fake:
        variant = Variant(model).with_transforms([StaticCache()])
        variant.step = InductorGraphStep(model, fake)  # nothing prepared: plain tokens run the module
        PROMPT.apply(variant)
        assert variant.speculation is not None
        variant.speculation.costs, several = evenly(variant.speculation.tokens, 1.1), variant.speculation.stride.several
        assert several is not None
        timed, options = several.replays, {"logits_processor": [Copying()], "max_new_tokens": 30}
        same(ask(serving(variant), REPEATING, **options), ask(model, REPEATING, **options))
        assert several.replays - timed == variant.speculation.tally.steps > 0


def test_a_graph_that_has_no_room_left_is_not_replayed() -> None:
    model = tiny()
    with device.stand_in(FakeCuda()):
        graph = CudaGraph(phase="decode", slots=60)
        variant = Variant(model).with_transforms([graph, Speculation("decode", tokens=8)])
        assert variant.speculation is not None
        variant.speculation.costs, several = evenly(variant.speculation.tokens, 1.1), variant.speculation.stride.several
        assert several is not None
        timed = several.replays
        options: dict[str, Any] = {"logits_processor": [Copying()], "max_new_tokens": 13}
        same(ask(serving(variant), REPEATING, **options), ask(model, REPEATING, **options))
        assert 0 < several.replays - timed < variant.speculation.tally.steps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("draft", [PROMPT, MODEL], ids=str)
def test_on_a_gpu_guesses_are_checked_in_graphs(draft: Speculation, dtype: torch.dtype) -> None:
    model, small = tiny().to("cuda", dtype), tiny().to("cuda", dtype)
    variant = Variant(model, draft=small).with_transforms([CudaGraph(phase="decode"), draft])
    assert variant.speculation is not None
    variant.speculation.costs = evenly(variant.speculation.tokens, 1.1)
    copying = {"logits_processor": [Copying()], "max_new_tokens": 60}
    same(ask(serving(variant), REPEATING.cuda(), **copying), ask(model, REPEATING.cuda(), **copying))
    assert variant.speculation.tally.right > 20
    if dtype is torch.float32:  # in BF16 a near tie may fall the other way
        same(ask(serving(variant), RANDOM.cuda(), max_new_tokens=60), ask(model, RANDOM.cuda(), max_new_tokens=60))
    several = variant.speculation.stride.several
    assert several is not None
    assert several.replays > 0
    assert not several.fallbacks


def test_a_wrapped_model_guesses_and_says_how_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    from autotune.tune import plan as plans
    from autotune.tune import run as tuning
    from autotune.tune.fingerprint import Fingerprint

    def scripted(model: Any, workload: Any, policy: Any, *, draft: Any, traffic: Any, **_: Any) -> Tuned:
        variant = Variant(model, traffic, workload, draft).with_transform(MODEL)
        assert variant.speculation is not None
        variant.speculation.costs = evenly(variant.speculation.tokens, 1.1)  # a draft as slow as the model does not pay
        none = Fingerprint("", "", {}, "", "", "strict")
        return Tuned(variant, plans.Plan(none, variant.transforms), None, "won")

    monkeypatch.setattr(tuning, "tune", scripted)
    model, draft = tiny(), tiny()
    expected = ask(model, REPEATING, max_new_tokens=21)
    autotune.wrap(model, draft=draft, workload=token_prompts(4), when="blocking", cache=False)
    assert torch.equal(ask(model, REPEATING, max_new_tokens=21), expected)
    told = model.autotune.status.speculation
    assert told.right == told.guessed > 0
    assert "accepted (100%)" in str(told)
    model.autotune.rollback()
    assert model.autotune.status.speculation is None


def test_a_plan_is_valid_for_its_draft() -> None:
    from autotune.tune import fingerprint, policy

    model, work = tiny(), Workload(tuple(map(tuple, token_prompts(4))), 12, (1,))
    balanced = policy.load("balanced")
    keys = [fingerprint.of(model, COMPILER, work, balanced, d) for d in (None, tiny(), tiny(), tiny(seed=1))]
    assert keys[0] != keys[1] == keys[2] != keys[3]
