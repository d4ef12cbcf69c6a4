"""Prefill of short prompts as CUDA graphs on a device that is not there: the original's tokens, from the slots."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from autotune.errors import ChoiceError, TransformError, VariantError
from autotune.live.original import Original
from autotune.model import seam
from autotune.runtime.dispatch import serving
from autotune.runtime.steps import graphs
from autotune.runtime.steps.prompts import PromptGraphs
from autotune.runtime.variant import Variant
from autotune.transforms import make
from autotune.transforms.capture_prefill import CapturePrefill
from autotune.transforms.cuda_graph import CudaGraph
from autotune.transforms.static_cache import StaticCache
from autotune.workload import Workload
from tests.fakes.cuda import FakeCuda
from tests.models import left_padded, tiny, token_prompts
from tests.runtime.test_graphs import ARCHITECTURES, CUDA

GRAPH, PROMPTS = CudaGraph(phase="decode", shortest=32), CapturePrefill(phase="prefill", longest=64)


def variant_of(model: Any, *transforms: Any, batches: tuple[int, ...] = (1,)) -> Variant:
    work = Workload(tuple(map(tuple, token_prompts(4, 40))), 12, batches)
    return Variant(model, workload=work).with_transforms(transforms or (GRAPH, PROMPTS))


def prompts_of(variant: Variant) -> PromptGraphs:
    assert variant.prompts is not None
    return variant.prompts


def ids_of(length: int, seed: int = 3) -> torch.Tensor:
    return torch.tensor(token_prompts(1, length, seed))  # [1, length]


def ask(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(ids, **({"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prompts_of_every_length_are_answered_as_by_the_original(arch: str, fake: FakeCuda) -> None:
    """Around the graphs' lengths, one beyond them, and shorter after longer, whose filling stays in the slots."""
    model = tiny(arch)
    variant = variant_of(model)
    served, prompts = serving(variant), prompts_of(variant)
    assert set(prompts.shapes) == {(1, 32), (1, 64)}
    before = prompts.replays
    for length in (1, 31, 32, 33, 64, 65, 40, 5):
        assert torch.equal(ask(served, ids_of(length)), ask(model, ids_of(length)))
    assert prompts.replays == before + 7, "all but the one of 65"
    assert not prompts.fallbacks
    assert PROMPTS.took_effect(variant) is None


@pytest.mark.parametrize("transforms", [(GRAPH, PROMPTS), (StaticCache(), PROMPTS)], ids=["graph", "slots"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2},
        {"max_new_tokens": 1},
        {"eos_token_id": list(range(40))},
        {"attention_mask": torch.ones(1, 40, dtype=torch.int64)},
        {"position_ids": torch.arange(40)[None] + 3},
    ],
    ids=["sampling", "one token", "end", "mask", "positions"],
)
def test_every_request_is_answered_as_by_transformers(transforms: Any, options: Any, fake: FakeCuda) -> None:
    model = tiny("llama")
    variant = variant_of(model, *transforms)
    before = prompts_of(variant).replays
    assert torch.equal(ask(serving(variant), ids_of(40), **options), ask(model, ids_of(40), **options))
    assert prompts_of(variant).replays == before + 1


@pytest.mark.parametrize(
    ("transforms", "copies"), [((GRAPH, PROMPTS), []), ((GRAPH,), [2 * 3])], ids=["captured", "uncaptured"]
)
def test_a_prompts_numbers_are_written_where_steps_read_them_or_copied_there_at_once(
    transforms: Any, copies: list[int], fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of each layer's keys and values would be launched by itself."""
    model = tiny("llama", num_hidden_layers=3)
    served, expected = serving(variant_of(model, *transforms)), ask(model, ids_of(40))
    copied, copy = list[int](), torch._foreach_copy_

    def noted(rooms: Any, given: Any) -> Any:
        copied.append(len(rooms))
        return copy(rooms, given)

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    assert torch.equal(ask(served, ids_of(40)), expected)
    assert copied == copies


def test_the_cache_that_is_returned_has_the_prompt(fake: FakeCuda) -> None:
    model = tiny("llama")
    variant = variant_of(model)
    got, expected = (ask(each, ids_of(40), return_dict_in_generate=True) for each in (serving(variant), model))
    for ours, theirs in zip(
        seam.keys_and_values(seam.cache_in(vars(got) | dict(got))),
        seam.keys_and_values(seam.cache_in(vars(expected) | dict(expected))),
        strict=True,
    ):
        for held, wanted in zip(ours, theirs, strict=True):
            assert held.shape == wanted.shape
            torch.testing.assert_close(held, wanted)


def test_what_graphs_do_not_hold_is_computed_elsewhere(fake: FakeCuda) -> None:
    """Batches, padding, and longer prompts: in a cache that grows, as before."""
    model = tiny("llama")
    variant = variant_of(model, batches=(1, 3))
    served, before = serving(variant), prompts_of(variant).replays
    padded = left_padded()
    for given in (padded, {name: each[:1] for name, each in padded.items()}):
        ids, mask = given["input_ids"], given["attention_mask"]
        assert not mask[0].all()
        assert torch.equal(ask(served, ids, attention_mask=mask), ask(model, ids, attention_mask=mask))
    assert prompts_of(variant).replays == before


def test_numbers_that_are_not_finite_stay_behind(fake: FakeCuda) -> None:
    """A prompt's filling may overflow where the prompt does not; NaN times an attention weight of 0 is NaN."""
    model = tiny("llama")
    variant = variant_of(model)
    served, pool = serving(variant), variant.caches
    assert pool is not None
    ask(served, ids_of(33))
    with pool.lend_idle(1) as cache:
        assert cache is not None
        cache.begin_padded(3, 128)
        for held in (*cache.keys, *cache.values):
            held[:, :, 3:128] = torch.nan  # all that a prompt of 3 tokens and its filling may leave
    assert torch.equal(ask(served, ids_of(5)), ask(model, ids_of(5)))
    assert not any(torch.isnan(held).any() for held in (*cache.keys, *cache.values))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_filling_overflows_only_where_the_prompt_does(arch: str, fake: FakeCuda) -> None:
    """It repeats the last token, whose numbers it gets: a NaN of others would reach the prompt through 0 x NaN."""
    length, model = 33, tiny(arch).half()
    expected = ask(serving(variant_of(model)), ids_of(length))

    def overflowing(_: Any, given: Any, out: Any) -> None:
        hidden = (out[0] if isinstance(out, tuple) else out)[0]  # [P, H]
        if len(hidden) > length:
            differs = (hidden - hidden[length - 1]).abs().amax(1) > 0.002 * hidden.abs().amax()
            filling = torch.arange(len(hidden), device="cpu") >= length
            hidden.masked_fill_((differs & filling)[:, None], torch.inf)

    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    layers[0].register_forward_hook(overflowing)
    variant = variant_of(model)
    before = prompts_of(variant).replays
    assert torch.equal(ask(serving(variant), ids_of(length)), expected)
    assert prompts_of(variant).replays == before + 1


def test_more_callers_than_caches(fake: FakeCuda) -> None:
    """A prompt for which no cache is idle is computed as before; none is lent to two."""
    model = tiny("llama")
    variant = variant_of(model)
    served, pool, prompts = serving(variant), variant.caches, prompts_of(variant)
    assert pool is not None
    with ExitStack() as lent:
        held = [lent.enter_context(pool.lend_idle(1)) for _ in range(3)]
        assert len(set(map(id, held[:2]))) == 2
        assert held[2] is None
        before = prompts.replays
        assert torch.equal(ask(served, ids_of(40)), ask(model, ids_of(40)))
        assert prompts.replays == before
    answers = dict[int, torch.Tensor]()

    def caller(seed: int) -> None:
        answers[seed] = served.generate(ids_of(40, seed), max_new_tokens=12, do_sample=False, pad_token_id=0)

    callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    for seed, answer in answers.items():
        assert torch.equal(answer, ask(model, ids_of(40, seed)))


def test_an_error_gives_the_cache_back(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    variant = variant_of(model)
    served, pool, prompts = serving(variant), variant.caches, prompts_of(variant)
    assert pool is not None
    idle = len(pool._idle[1])

    def failing(*_: Any) -> None:
        raise RuntimeError("a replay failed")

    with monkeypatch.context() as patched:
        patched.setattr(prompts, "_replayed", failing)
        with pytest.raises(VariantError, match="a replay failed"):
            ask(served, ids_of(40))
    assert len(pool._idle[1]) == idle
    assert torch.equal(ask(served, ids_of(40)), ask(model, ids_of(40)))


def test_a_shape_that_fails_at_a_replay_runs_uncaptured(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    variant = variant_of(model)
    prompts = prompts_of(variant)

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(graphs.Captured, "replay", exhausted)
        cold = Variant(model, workload=variant.workload).with_transforms([StaticCache()])
        cold.prompts, cold.caches = prompts, variant.caches
        assert torch.equal(ask(serving(cold), ids_of(40)), ask(model, ids_of(40)))
    assert prompts.fallbacks == {"out of memory": 1}


def test_weights_that_moved_are_captured_anew(fake: FakeCuda) -> None:
    model = tiny("llama")
    variant = variant_of(model)
    held = [weakref.ref(graph) for each in prompts_of(variant)._graphs.values() for graph in each.values()]
    Original(model).release(variant)
    gc.collect()
    assert not [each for each in held if each() is not None]
    assert set(prompts_of(variant).shapes) == {(1, 32), (1, 64)}
    assert torch.equal(ask(serving(variant), ids_of(40)), ask(tiny("llama"), ids_of(40)))


def test_the_graphs_share_memory_and_their_number_is_limited(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    variant = variant_of(model, GRAPH, CapturePrefill(phase="prefill"))
    prompts, pool = prompts_of(variant), variant.caches
    assert pool is not None
    assert prompts.lengths == (32, 64, pool.slots)
    assert prompts.captures == len(prompts.lengths) * pool.lasting
    assert len({id(graph.graph.pool) for each in prompts._graphs.values() for graph in each.values()}) == 1  # type: ignore[attr-defined]
    monkeypatch.setattr("autotune.runtime.steps.captures.MOST_GRAPHS", 2)
    assert prompts_of(variant_of(model, GRAPH, CapturePrefill(phase="prefill"))).captures == 2


def test_prefill_that_waits_for_the_device_is_refused(fake: FakeCuda) -> None:
    variant = variant_of(tiny("llama"), StaticCache())
    (module,) = variant.edit("prefill")
    module.model.norm.register_forward_hook(lambda layer, given, out: out * (1.0 if out.sum().item() else 2.0))
    with pytest.raises(TransformError, match="prefill cannot be captured: the step waits for the device"):
        variant.with_transform(PROMPTS)
    assert not fake.captures


def test_a_replay_that_differs_is_refused(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = variant_of(tiny("llama"), StaticCache())
    monkeypatch.setattr(graphs, "agree", lambda given, expected: False)
    with pytest.raises(TransformError, match="a replay of prefill gives other logits"):
        variant.with_transform(PROMPTS)


def test_captured_beside_a_compiled_prefill(fake: FakeCuda) -> None:
    """Short prompts are captured uncompiled; what prefill computes otherwise stays compiled."""
    model = tiny("llama")
    variant, calls = variant_of(model, StaticCache()), list[int]()
    (module,) = variant.edit("prefill")
    plain = module.forward

    def compiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].shape[1])
        return plain(*args, **kwargs)

    compiled.is_of_one_module = True  # type: ignore[attr-defined]  # as `Recompiling`
    module.forward = compiled
    captured = variant.with_transform(PROMPTS)
    for length in (40, 70):
        assert torch.equal(ask(serving(captured), ids_of(length)), ask(model, ids_of(length)))
    assert calls == [70]


@pytest.mark.parametrize(
    ("transforms", "batches", "reason"),
    [
        ((), (1,), "decode reads none yet"),
        ((GRAPH, PROMPTS), (1,), "prefill is captured already"),
        ((StaticCache(),), (2,), "it serves single sequences"),
        ((StaticCache(), make("attention", {"implementation": "sdpa:flash"}, "prefill")), (1,), None),  # CPU's masks
        ((StaticCache(),), (1,), None),
    ],
)
def test_says_why_not(transforms: Any, batches: tuple[int, ...], reason: str | None, fake: FakeCuda) -> None:
    work = Workload(tuple(map(tuple, token_prompts(4))), 12, batches)
    variant = Variant(tiny("llama"), workload=work).with_transforms(transforms)
    found = PROMPTS.unavailable(variant, CUDA)
    assert found is None if reason is None else reason in (found or "")


def test_prompts_beyond_the_longest_graph_need_none(fake: FakeCuda) -> None:
    work = Workload(tuple(map(tuple, token_prompts(4, 65))), 12)
    variant = Variant(tiny("llama"), workload=work).with_transforms([StaticCache()])
    assert "the workload's prompts have 65 and more" in (PROMPTS.unavailable(variant, CUDA) or "")


def test_a_cpu_has_no_graphs() -> None:
    assert "no graphs" in (PROMPTS.unavailable(Variant(tiny("llama")), CUDA) or "")


def test_slots_are_not_exchanged_under_captured_prompts(fake: FakeCuda) -> None:
    variant = variant_of(tiny("llama"), StaticCache(), PROMPTS)
    assert "prefill is captured already" in (GRAPH.unavailable(variant, CUDA) or "")


@pytest.mark.parametrize(("phase", "longest"), [("decode", 512), ("both", 512), ("prefill", 16)])
def test_parameters_are_checked(phase: Any, longest: int) -> None:
    with pytest.raises(ChoiceError, match="capture_prefill: "):
        CapturePrefill(phase=phase, longest=longest)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_on_a_gpu(arch: str) -> None:
    model = tiny(arch).to("cuda")
    variant = variant_of(model)
    for length in (1, 31, 33, 64, 65, 5):
        ids = ids_of(length).to("cuda")
        assert torch.equal(ask(serving(variant), ids), ask(model, ids))
    assert not prompts_of(variant).fallbacks
