"""The decode step as CUDA graphs on a device that is not there: the original's tokens; the classic mistakes caught.

Tests marked `gpu` are the same on a real one.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune.errors import ChoiceError, DeviceError, TransformError, UnreadyError, VariantError
from autotune.live.original import Original
from autotune.machine import device
from autotune.machine.device import Graph
from autotune.machine.hardware import Hardware
from autotune.model import seam
from autotune.runtime.cache import slot_forward
from autotune.runtime.cache import slots as cache
from autotune.runtime.cache.slots import SlotCache
from autotune.runtime.dispatch import serving
from autotune.runtime.steps import compiled
from autotune.runtime.steps.captures import buckets, lengths
from autotune.runtime.steps.graphs import Captured, GraphSteps, agree
from autotune.runtime.steps.inductor_graphs import InductorGraphStep
from autotune.runtime.steps.waiting import require_no_wait
from autotune.runtime.variant import Variant
from autotune.transforms.compile_step import CompileStep
from autotune.transforms.cuda_graph import CudaGraph, uncapturable
from autotune.transforms.static_cache import StaticCache
from autotune.workload import Workload
from tests.fakes.cuda import FakeCuda
from tests.fakes.rules import Misuse
from tests.models import left_padded, tiny, token_prompts

IDS = torch.tensor([token_prompts(1)[0]])  # [1, 12]
GRAPH = CudaGraph(phase="decode", shortest=16)
CUDA = Hardware("cuda", "test", "9.0", 1, 2**36, 3e12, {"float32": 6e13, "bfloat16": 9e14}, None, {})
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt-neox", "mistral-window"]


def graphed(model: Any, transform: CudaGraph = GRAPH, batches: tuple[int, ...] = (1, 3)) -> Variant:
    work = Workload(tuple(map(tuple, token_prompts(4))), 12, batches)
    return Variant(model, workload=work).with_transform(transform)


def steps_of(variant: Variant) -> GraphSteps:
    assert isinstance(variant.step, GraphSteps)
    return variant.step


def ask(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return model.generate(ids, **({"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options))


def ask_padded(model: Any) -> torch.Tensor:
    padded = {name: tensor.to(model.device) for name, tensor in left_padded().items()}
    return ask(model, padded["input_ids"], attention_mask=padded["attention_mask"])


@pytest.mark.parametrize(
    ("capacity", "shortest", "expected"),
    [(128, 256, (128,)), (256, 256, (256,)), (1000, 256, (256, 512, 1000)), (128, 16, (16, 32, 64, 128))],
)
def test_lengths_double_until_they_cover_all(capacity: int, shortest: int, expected: tuple[int, ...]) -> None:
    assert lengths(capacity, shortest) == expected


@pytest.mark.parametrize(
    ("batches", "largest", "expected"),
    [
        ((1,), 0, (1,)),
        ((1, 3), 0, (1, 4)),
        ((3, 4, 1), 0, (1, 4)),
        ((1, 3, 8), 4, (1, 4)),
        ((1, 3, 8), 2, (1, 2)),
        ((1,), 8, (1, 8)),
    ],
)
def test_buckets_hold_the_workload(batches: tuple[int, ...], largest: int, expected: tuple[int, ...]) -> None:
    assert buckets(batches, largest) == expected


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ([1.0, -4.0, -torch.inf], True),
        ([1.05, -4.0, -torch.inf], True),
        ([1.5, -4.0, -torch.inf], False),
        ([1.0, -4.0, 0.0], False),
        ([torch.nan, -4.0, -torch.inf], False),
    ],
)
def test_logits_agree_but_for_rounding(given: list[float], same: bool) -> None:
    assert agree(torch.tensor([given]), torch.tensor([[1.0, -4.0, -torch.inf]])) is same


@pytest.mark.parametrize("ends", ["candidate", "incumbent"])
def test_the_end_of_graphs_leaves_the_others_whole(ends: str, fake: FakeCuda) -> None:
    """A trial was rejected, or replaced what served before: its graphs go, with the workspaces of their stream."""
    model = tiny("llama")
    variants = {"incumbent": graphed(model), "candidate": graphed(model)}
    for variant in variants.values():
        ask(serving(variant))
    ended = weakref.ref(steps_of(variants.pop(ends)))
    del variant
    gc.collect()
    assert ended() is None
    (left,) = variants.values()
    assert torch.equal(ask(serving(left)), ask(model))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_decodes_the_same_tokens(arch: str, fake: FakeCuda) -> None:
    """Over two boundaries between lengths and beyond the windows; left-padded, a batch of 3 in the graph for 4."""
    model = tiny(arch)
    variant = graphed(model)
    served = serving(variant)
    assert torch.equal(ask(served, max_new_tokens=60), ask(model, max_new_tokens=60))
    assert torch.equal(ask_padded(served), ask_padded(model))
    steps = steps_of(variant)
    assert set(steps.shapes) == set(product((1, 4), (16, 32, 64, 128)))
    assert not steps.fallbacks
    assert steps.captures == fake.captures == 2 * len(steps.shapes), "for two callers"
    assert GRAPH.took_effect(variant) is None


REQUESTS: dict[str, dict[str, Any]] = {
    "one token": {"max_new_tokens": 1},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "end of sequence": {"eos_token_id": list(range(40))},
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_every_request_is_answered_as_by_transformers(request_: str, fake: FakeCuda) -> None:
    model, options = tiny("llama"), REQUESTS[request_]
    served = serving(graphed(model))
    assert torch.equal(ask(served, **options), ask(model, **options))


def test_generations_in_turn_see_nothing_of_each_other(fake: FakeCuda) -> None:
    """Long, short, padded, and wide: what the last one left in slots, rows and buffers does not reach the next."""
    model = tiny("llama")
    variant = graphed(model)
    served, padded = serving(variant), left_padded()
    wide = torch.tensor(token_prompts(4, seed=9))
    for _ in range(2):
        for ids, options in [
            (IDS, {"max_new_tokens": 40}),
            (IDS[:, :3], {}),
            (wide, {}),
            (padded["input_ids"], {"attention_mask": padded["attention_mask"]}),
            (IDS.flip(1), {"eos_token_id": list(range(40))}),
            (padded["input_ids"][:2], {"attention_mask": padded["attention_mask"][:2]}),
        ]:
            assert torch.equal(ask(served, ids, **options), ask(model, ids, **options))
    assert not steps_of(variant).fallbacks


def test_a_cache_is_lent_in_the_order_of_what_was_queued(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next user's stream waits for what the last user's still has to read."""
    variant, waits = graphed(tiny("llama")), list[Any]()
    ask(serving(variant))
    assert variant.caches is not None
    idle = variant.caches._idle[1][-1]
    left, wait = idle.left, fake.wait
    monkeypatch.setattr(fake, "wait", lambda mark: (waits.append(mark), wait(mark)))
    ask(serving(variant))
    assert left is not None
    assert left in waits
    assert idle.left > left


def test_a_dropped_variant_leaves_no_graph_behind(fake: FakeCuda) -> None:
    variant = graphed(tiny("llama"))
    ask(serving(variant))
    steps = steps_of(variant)
    held = [weakref.ref(graph) for graphs in steps._graphs.values() for graph in graphs.values()]
    caches = [weakref.ref(cache) for cache in steps._graphs]
    del variant, steps
    gc.collect()
    assert held
    assert not [each for each in (*held, *caches) if each() is not None]


def test_a_nan_left_in_any_row_or_slot_reaches_nobody(fake: FakeCuda) -> None:
    variant = graphed(tiny("llama"))
    served = serving(variant)
    before = ask_padded(served)
    assert variant.caches is not None
    for idle in variant.caches._idle[4]:
        for tensor in (*idle.keys, *idle.values):
            tensor[:, :, : idle.length + 1] = torch.nan  # one more than counts: a step may have been launched ahead
    assert torch.equal(ask_padded(served), before)


def test_a_larger_batch_runs_uncaptured_and_is_counted(fake: FakeCuda) -> None:
    model = tiny("llama")
    variant = graphed(model)
    five = torch.tensor(token_prompts(5))
    assert torch.equal(ask(serving(variant), five), ask(model, five))
    assert dict(steps_of(variant).fallbacks) == {"a batch of 5, beyond the largest bucket of 4": 11}
    assert "11 steps uncaptured (a batch of 5, beyond" in str(variant.step)


@pytest.mark.fault("D58")
def test_two_threads_at_once_get_their_own_answers(fake: FakeCuda) -> None:
    model = tiny("llama")
    variant = graphed(model)
    served, prompts = serving(variant), [torch.tensor([p]) for p in token_prompts(4, seed=7)]
    expected, given = [ask(model, ids) for ids in prompts], dict[int, list[torch.Tensor]]()
    together = threading.Barrier(len(prompts))

    def serve(number: int) -> None:
        together.wait()
        given[number] = [ask(served, prompts[number]) for _ in range(3)]

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(answer, expected[n]) for n, answers in given.items() for answer in answers)
    assert len(given) == len(prompts)
    assert variant.caches is not None
    assert len(variant.caches._idle[1]) == 2, "threads multiply caches"


def test_graphs_are_replayed_while_another_model_s_step_is_compiled(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, begun, answered, outcome = (
        serving(graphed(tiny("llama"))),
        threading.Event(),
        threading.Event(),
        list[str](),
    )
    expected = ask(served)

    def compiling(*_: Any) -> torch.Tensor:
        begun.set()
        outcome.append("answered" if answered.wait(30) else "waited")  # a compiler takes minutes
        raise RuntimeError("no such operator")

    def compile_another() -> None:
        plan = CompileStep(phase="decode", mode="reduce-overhead")
        with pytest.raises(TransformError, match="no such operator"):
            Variant(tiny("qwen3")).with_transform(plan)

    monkeypatch.setattr(InductorGraphStep, "_call", compiling)
    thread = threading.Thread(target=compile_another)
    thread.start()
    assert begun.wait(60)
    assert torch.equal(ask(served), expected)
    answered.set()
    thread.join()
    assert outcome == ["answered"]


def test_threads_do_not_replay_at_once(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has copied its inputs in and not yet its result out; the other waits, and must."""
    assert not overlapping(monkeypatch, 0.2)
    monkeypatch.setattr(GraphSteps, "_replayed", _replays("stream", "before", "after"))
    assert any("two threads queue into the device's stream" in each for each in overlapping(monkeypatch, 60.0))


def overlapping(monkeypatch: pytest.MonkeyPatch, wait_s: float) -> list[str]:
    """What goes wrong with two calls, of which one has so long to begin in the middle of the other's first replay."""
    variant, replay, wrong = graphed(tiny("llama")), Captured.replay, list[str]()
    served = serving(variant)

    def call(ids: torch.Tensor) -> None:
        try:
            ask(served, ids)
        except VariantError as error:
            wrong.append(str(error))

    other = threading.Thread(target=call, args=(IDS.flip(1),))

    def interrupted(*given: Any) -> None:
        if not other.ident:
            other.start()
            other.join(wait_s)
        replay(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Captured, "replay", interrupted)
        call(IDS)
        other.join()
    return [*wrong, *steps_of(variant).fallbacks]


@pytest.mark.fault("A20")
def test_results_belong_to_the_caller(fake: FakeCuda) -> None:
    """Logits and caches that were handed out stay as they were."""
    model = tiny("llama")
    served = serving(graphed(model))
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    first: Any = ask(served, **options)
    held = [t.clone() for t in (*first.logits, first.sequences, *seam.keys_and_values(seam.cache_in(first))[0])]
    ask(served, IDS.flip(1), **options)
    after = (*first.logits, first.sequences, *seam.keys_and_values(seam.cache_in(first))[0])
    assert all(torch.equal(a, b) for a, b in zip(held, after, strict=True))
    expected: Any = ask(model, **options)
    assert seam.cache_in(first).get_seq_length() == seam.cache_in(expected).get_seq_length()


@pytest.mark.fault("A19")
def test_a_failed_capture_is_told_once_and_counted(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0")  # where more than one may fail
    model = tiny("llama")
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = RuntimeError("operation not permitted when stream is capturing")
    monkeypatch.setattr(fake, "capture", refusing(fake, error, (2, 3)))
    variant = graphed(model, batches=(1,))
    assert torch.equal(ask(serving(variant), max_new_tokens=30), ask(model, max_new_tokens=30))
    told = [r for r in caplog.records if "not permitted" in r.getMessage()]
    assert len(told) == 2, "64 slots and 128, each told once"
    (reason,) = steps_of(variant).fallbacks
    assert "not permitted" in reason
    assert steps_of(variant).fallbacks[reason] == 30 - 1 - 20, "steps beyond the 32 slots that were captured"


def test_a_step_of_the_workload_that_cannot_be_captured_is_refused(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "capture", refusing(fake, RuntimeError("not now"), (1,)))
    with pytest.raises(TransformError, match="cannot be captured: RuntimeError: not now"):
        graphed(tiny("llama"))


def test_dynamic_rope_is_refused_before_a_capture(fake: FakeCuda) -> None:
    """It compares the position with a number of the host's in every step."""
    with pytest.raises(TransformError, match="computes its buffers anew as contexts grow"):
        graphed(tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    assert fake.captures == 0


COPIES: list[tuple[Callable[[torch.Tensor], object], bool]] = [
    (lambda x: x.to("meta"), True),
    (lambda x: x.to("meta", non_blocking=True), False),
    (lambda x: x.to(torch.float16), False),
    (lambda x: x.mul(2), False),
    (lambda x: x.nonzero(), True),
    (lambda x: bool(x.any()), True),
]


@pytest.mark.parametrize(("step", "waits"), COPIES)
def test_what_waits_for_the_device_is_seen(step: Callable[[torch.Tensor], object], waits: bool) -> None:
    with pytest.raises(TransformError, match="waits for the device") if waits else nullcontext():
        require_no_wait(lambda: step(torch.ones(4)))


def test_memory_that_runs_out_during_a_capture_is_given_back(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0")  # where more than one may fail
    model, capture = tiny("llama"), fake.capture
    monkeypatch.setattr(fake, "capture", refusing(fake, torch.OutOfMemoryError("CUDA out of memory."), (2, 3)))
    variant = graphed(model, batches=(1,))
    assert torch.equal(ask(serving(variant), max_new_tokens=30), ask(model, max_new_tokens=30))
    assert dict(steps_of(variant).fallbacks) == {"out of memory": 9}
    assert fake.trims == 2
    monkeypatch.setattr(fake, "capture", capture)
    steps_of(variant).forget()
    ask(serving(variant), max_new_tokens=30)
    assert steps_of(variant).fallbacks.total() == 9, "what was forgotten is tried anew"


def test_memory_that_runs_out_at_a_replay_costs_the_graph_alone(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    variant = graphed(model)
    with monkeypatch.context() as patch:
        patch.setattr(Captured, "replay", _raise(torch.OutOfMemoryError("CUDA out of memory.")))
        assert torch.equal(
            ask(serving(variant), IDS[:, :3], max_new_tokens=8), ask(model, IDS[:, :3], max_new_tokens=8)
        )
    assert dict(steps_of(variant).fallbacks) == {"out of memory": 7}
    assert [16 in graphs for cache, graphs in steps_of(variant)._graphs.items() if cache.shape[0] == 1].count(True) == 1
    assert torch.equal(ask(serving(variant)), ask(model)), "the other lengths are replayed as before"


@pytest.mark.parametrize("captured", [False, True])
def test_idle_caches_make_room_for_a_larger_one(
    captured: bool, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those with graphs, which only a turn could capture anew: then the larger call is refused."""
    model = tiny("llama")
    variant = graphed(model) if captured else Variant(model).with_transform(StaticCache())
    ask(serving(variant))
    room, trims = cache._room, fake.trims

    def limited(sample: torch.Tensor, rows: int, *given: Any) -> torch.Tensor:
        if rows == 5 and fake.trims == trims:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return room(sample, rows, *given)

    monkeypatch.setattr(cache, "_room", limited)
    five = torch.tensor(token_prompts(5))
    if captured:
        with pytest.raises(UnreadyError, match="CUDA out of memory"):
            ask(serving(variant), five)
        assert not steps_of(variant).fallbacks
    else:
        assert torch.equal(ask(serving(variant), five), ask(model, five))
        assert variant.caches is not None
        assert {rows for rows, idle in variant.caches._idle.items() if idle} == {5}
    assert torch.equal(ask(serving(variant)), ask(model))
    assert not captured or not steps_of(variant).fallbacks


def test_the_device_s_last_error_is_one_clear_exception(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = graphed(tiny("llama"))
    dead = _raise(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    monkeypatch.setattr("autotune.runtime.steps.graphs.Captured.replay", dead)
    for _ in range(2):
        with pytest.raises(DeviceError, match="restart the process"):
            ask(serving(variant))


def do_in_every_step(act: Callable[[torch.Tensor], object], model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the model's forward do something with its logits."""
    forward = type(model).forward

    @functools.wraps(forward)
    def acting(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        act(out.logits)
        return out

    monkeypatch.setattr(type(model), "forward", acting)


def wait(logits: torch.Tensor) -> None:
    logits.max().item()


def test_a_step_that_waits_is_refused_before_a_capture(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    do_in_every_step(wait, model, monkeypatch)
    with pytest.raises(TransformError, match=r"cannot be captured: the step waits for the device \(aten::.*\)"):
        graphed(model)
    assert fake.captures == 0


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments of each compilation, none of which compiles: the code that would be compiled runs."""
    made = list[Any]()

    def compile_ahead(arguments: Any, *given: Any) -> Any:
        made.append(arguments)
        return SimpleNamespace(disable_guard_check=lambda: None, fn=slot_forward.run)

    monkeypatch.setattr(compiled, "compile_ahead", compile_ahead)
    monkeypatch.setattr(compiled, "artifact", lambda *given: None)
    return made


def test_a_compiled_step_that_waits_is_refused_before_it_is_compiled_for_graphs(
    fake: FakeCuda, compilations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    do_in_every_step(wait, model, monkeypatch)
    variant = Variant(model, workload=Workload(((1, 2, 3),), 12, (1,))).with_transform(CompileStep(phase="decode"))
    before = len(compilations)
    with pytest.raises(TransformError, match="the step waits for the device"):
        variant.with_transform(GRAPH)
    assert (len(compilations), fake.captures, fake.lost_bytes) == (before, 0, 0)


@pytest.mark.parametrize(("release", "most"), [("2.13.0", 1), ("2.13.1+cu130", 1), ("2.14.0", 3), ("3.0.0+cpu", 3)])
def test_captures_that_keep_their_memory_may_fail_once(
    release: str, most: int, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy from the host, which no operator shows, ends captures after the workload's; each loses a pool."""
    monkeypatch.setattr(torch, "__version__", release)
    model, first = tiny("llama"), fake.captures + 2  # what the workload needs

    def copy(logits: torch.Tensor) -> None:
        if fake.captures > first:
            torch.tensor([1.0], device=logits.device)

    do_in_every_step(copy, model, monkeypatch)
    steps = steps_of(graphed(model, batches=(1,)))
    assert fake.captures - first == most
    assert set(steps.failed.values()) == {COPY}
    assert (fake.lost_bytes > 0, steps.captures) == (True, 2)


COPY = "Misuse: tensor copies between host and device while a graph is captured"


def test_a_graph_that_does_not_follow_its_inputs_is_refused(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host decides during a capture is frozen; here, the slot."""
    run = SlotCache.first

    def frozen(self: SlotCache, slots: int) -> SlotCache:
        part = run(self, slots)
        if part is self:
            return self
        part.slot = part.slot.clone()
        kept.append(part.slot)  # alive, or the fake would notice that it was freed
        return part

    kept = list[torch.Tensor]()
    monkeypatch.setattr(SlotCache, "first", frozen)
    with pytest.raises(TransformError, match="other logits"):
        graphed(tiny("llama"))


def test_weights_that_move_are_captured_anew(fake: FakeCuda) -> None:
    """As `release` and parking do it: `forget`, after addresses have changed."""
    model = tiny("llama")
    variant = graphed(model)
    served, before = serving(variant), ask(model)
    held = [p.data for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    del held
    with pytest.raises(VariantError, match="freed"):
        ask(served)
    shapes, captures = steps_of(variant).shapes, fake.captures
    steps_of(variant).forget()
    assert set(steps_of(variant).shapes) == set(shapes)
    assert fake.captures == 2 * captures
    assert torch.equal(ask(served), before)
    assert fake.captures == 2 * captures
    assert not steps_of(variant).fallbacks


def test_a_released_original_is_captured_anew(fake: FakeCuda) -> None:
    model = tiny("llama")
    variant = graphed(model)
    served, before, captures = serving(variant), ask(model), fake.captures
    Original(model).release(variant)
    assert fake.captures > captures
    assert torch.equal(ask(served), before)
    assert not steps_of(variant).fallbacks


def test_inference_mode_leaves_nothing_behind(fake: FakeCuda) -> None:
    model = tiny("llama")
    served = serving(graphed(model))
    with torch.inference_mode():
        first = ask(served, max_new_tokens=40)
    assert torch.equal(ask(served, max_new_tokens=40), first)


@pytest.mark.slow
def test_a_compiled_step_is_captured() -> None:
    with device.stand_in(FakeCuda(opaque=True)) as fake:
        model = tiny("llama")
        work = Workload(tuple(map(tuple, token_prompts(2))), 12, (1,))
        variant = Variant(model, workload=work).with_transforms([CompileStep(phase="decode"), GRAPH])
        assert torch.equal(ask(serving(variant), max_new_tokens=40), ask(model, max_new_tokens=40))
        steps = steps_of(variant)
        assert steps.inner is not None
        assert set(steps.inner.shapes) >= {(1, 32), (1, 128)}
        assert set(steps.shapes) == {(1, 32), (1, 128)}
        assert not steps.fallbacks
        assert CompileStep(phase="decode").took_effect(variant) is None
        assert fake.replays == steps.replays  # type: ignore[attr-defined]


def test_nothing_is_captured_twice(fake: FakeCuda) -> None:
    variant = graphed(tiny("llama"))
    assert "captured or recorded already" in (GRAPH.unavailable(variant, CUDA) or "")
    with pytest.raises(TransformError, match="captured or recorded already"):
        variant.with_transform(GRAPH)


def test_says_why_not() -> None:
    model = tiny("llama")
    assert "no graphs" in (GRAPH.unavailable(Variant(model), CUDA) or "")
    with pytest.raises(TransformError, match="no graphs"):
        Variant(model).with_transform(GRAPH)
    assert uncapturable(Variant(model)) is None
    assert "position_ids" in (uncapturable(Variant(tiny("mamba"))) or "")
    model.model.layers[0]._hf_hook = object()
    assert "hooks" in (uncapturable(Variant(model)) or "")
    spread = tiny("llama")
    spread.model.layers[1].to("meta")
    assert "several devices (cpu, meta)" in (uncapturable(Variant(spread)) or "")
    program = Variant(tiny("llama"))
    program.step = object.__new__(type("StepPrograms", (), {}))  # only its not being a compiled step matters
    assert "recorded already" in (uncapturable(program) or "")


@pytest.mark.parametrize("params", [{"phase": "both"}, {"shortest": 0}, {"largest": -1}, {"slots": -1}])
def test_parameters_are_checked(params: dict[str, Any]) -> None:
    with pytest.raises(ChoiceError, match="cuda_graph"):
        CudaGraph(**({"phase": "decode"} | params))


def test_it_builds_on_a_static_cache_and_leaves_the_parent_alone(fake: FakeCuda) -> None:
    model = tiny("llama")
    parent = Variant(model).with_transform(StaticCache(slots=64))
    assert GRAPH.extra_bytes(parent) == StaticCache(slots=64).extra_bytes(Variant(model)) > 0  # slots of its own
    child = parent.with_transform(GRAPH)
    assert parent.step is None
    assert GRAPH.took_effect(parent) is not None
    assert parent.caches is not child.caches
    assert child.caches is not None
    assert child.caches.slots == 64
    assert torch.equal(ask(serving(child)), ask(model))
    assert torch.equal(ask(serving(parent)), ask(model))


# The classic mistakes, made on purpose: each must be seen by a test as above, through the fake or through the tokens.


def _passes_a_new_tensor(self: Captured, token: torch.Tensor, position: torch.Tensor, out: torch.Tensor) -> None:
    self.token = token
    self.graph.replay()
    out.copy_(self.logits)


def _stays_at_a_position(self: Captured, token: torch.Tensor, position: torch.Tensor, out: torch.Tensor) -> None:
    self.token.copy_(token)
    self.graph.replay()
    out.copy_(self.logits)


def _replays(*steps: str) -> Callable[..., torch.Tensor]:
    """`GraphSteps._replayed` out of these: what each is for must be seen where it is missing."""

    def replayed(self: GraphSteps, captured: Captured, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        gpu, out = self.device, torch.empty_like(captured.logits)
        with gpu.queueing if "lock" in steps else nullcontext():
            before = gpu.mark()
            with gpu.stream() if "stream" in steps else nullcontext():
                if "before" in steps:
                    gpu.wait(before)
                captured.replay(token, position, out)
                after = gpu.mark()
        if "after" in steps:
            gpu.wait(after)
        return captured.logits if "buffer" in steps else out

    return replayed


def _reads_the_first_slots_alone(self: GraphSteps, tokens: int) -> int:
    return self.lengths[0]


def _forgets_the_slot(self: SlotCache, prompt: Any, mask: torch.Tensor | None) -> None:
    FILL(self, prompt, mask)
    self.slot = torch.full_like(self.slot, self.length)  # another tensor than the one that was captured


FILL = SlotCache.fill
MISTAKES: dict[str, tuple[Any, str, Callable[..., Any], str]] = {  # and who notices it
    "a new tensor instead of the static buffer": (Captured, "replay", _passes_a_new_tensor, "freed"),
    "a buffer that is not written": (Captured, "replay", _stays_at_a_position, "other logits"),
    "a replay in the caller's stream": (GraphSteps, "_replayed", _replays("lock"), "outside the device's stream"),
    "inputs that may not be there": (GraphSteps, "_replayed", _replays("lock", "stream", "after"), "queued before"),
    "a result that may not be there": (GraphSteps, "_replayed", _replays("lock", "stream", "before"), "was replayed"),
    "the static buffer as the result": (
        *(GraphSteps, "_replayed"),
        *(_replays("lock", "stream", "before", "after", "buffer"), "other logits"),
    ),
    "too few slots": (GraphSteps, "covering", _reads_the_first_slots_alone, "out of bounds"),
    "another slot tensor": (SlotCache, "fill", _forgets_the_slot, "freed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_classic_mistake_is_caught(mistake: str, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    served, options = serving(graphed(model)), {"return_dict_in_generate": True, "output_logits": True}
    expected: Any = ask(model, max_new_tokens=30, **options)
    right: Any = ask(served, max_new_tokens=30, **options)
    require_same(right, expected)
    where, name, wrong, noticed = MISTAKES[mistake]
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises((VariantError, AssertionError, Misuse), match=noticed):
        require_same(ask(served, max_new_tokens=30, **options), expected)


def require_same(mine: Any, theirs: Any) -> None:
    for given, expected in zip(mine.logits, theirs.logits, strict=False):
        assert torch.allclose(given, expected, atol=1e-4, rtol=1e-4), "other logits"
    assert torch.equal(mine.sequences, theirs.sequences)


def refusing(fake: FakeCuda, error: Exception, numbers: Sequence[int]) -> Callable[..., Any]:
    """`fake.capture`, of which calls with these numbers fail."""
    capture, number = fake.capture, count()
    return lambda *given: _raise(error)() if next(number) in numbers else capture(*given)


def _raise(error: Exception) -> Callable[..., Any]:
    def work(*_args: Any, **_kwargs: Any) -> tuple[Graph, torch.Tensor]:
        raise error

    return work


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "compiled"])
def test_on_a_gpu_the_tokens_are_the_same(arch: str, compiled: bool) -> None:
    model = tiny(arch).to("cuda")
    before = [CompileStep(phase="decode")] if compiled else []
    variant = Variant(model, workload=Workload(tuple(map(tuple, token_prompts(4))), 12, (1, 3)))
    variant = variant.with_transforms([*before, GRAPH])
    served, ids = serving(variant), IDS.to("cuda")
    for _ in range(2):
        assert torch.equal(ask(served, ids, max_new_tokens=60), ask(model, ids, max_new_tokens=60))
        assert torch.equal(ask_padded(served), ask_padded(model))
    assert not steps_of(variant).fallbacks
    assert GRAPH.took_effect(variant) is None


@pytest.mark.gpu
def test_on_a_gpu_threads_get_their_own_answers() -> None:
    model = tiny("llama").to("cuda")
    served, prompts = serving(graphed(model)), [torch.tensor([p], device="cuda") for p in token_prompts(4, seed=7)]
    expected, given = [ask(model, ids) for ids in prompts], dict[int, list[torch.Tensor]]()

    def serve(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            given[number] = [ask(served, prompts[number]) for _ in range(20)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == [0, 1, 2, 3]
    assert all(torch.equal(answer, expected[n]) for n, answers in given.items() for answer in answers)


@pytest.mark.gpu
def test_on_a_gpu_results_belong_to_the_caller() -> None:
    model, ids = tiny("llama").to("cuda"), IDS.to("cuda")
    served = serving(graphed(model))
    first: Any = ask(served, ids, return_dict_in_generate=True, output_logits=True)
    held = [t.clone() for t in first.logits]
    ask(served, ids.flip(1))
    assert all(torch.equal(a, b) for a, b in zip(held, first.logits, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_weights_that_move_are_captured_anew() -> None:
    model, ids = tiny("llama").to("cuda"), IDS.to("cuda")
    variant = graphed(model)
    before = ask(serving(variant), ids)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    steps_of(variant).forget()
    assert torch.equal(ask(serving(variant), ids), before)


@pytest.mark.slow
def test_graphs_are_captured_anew_around_a_step_that_is_compiled_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.transforms.compile_step.no_compiler", lambda _hardware: None)
    with device.stand_in(FakeCuda(opaque=True)):
        model, plan = tiny("llama"), CompileStep(phase="decode")
        graphs = graphed(model, batches=(1,))
        assert plan.unavailable(graphs, CUDA) is None
        assert "already" in (replace(plan, mode="reduce-overhead").unavailable(graphs, CUDA) or "")
        both = graphs.with_transform(plan)
        assert steps_of(both).inner is not None
        assert steps_of(graphs).inner is None
        assert "already" in (plan.unavailable(both, CUDA) or "")
        assert torch.equal(ask(serving(both)), ask(model))


@pytest.mark.slow
def test_inductor_s_own_graphs_run_on_the_owner_and_results_are_the_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor captures nothing on a CPU; which thread runs it, and what is handed out, is the same."""
    with device.stand_in(FakeCuda()) as fake:
        model, seen = tiny("llama"), set[int]()
        plan = CompileStep(phase="decode", mode="reduce-overhead")
        variant = Variant(model, workload=Workload(((1, 2, 3),), 12, (1,))).with_transform(plan)
        assert isinstance(variant.step, InductorGraphStep)
        assert plan.took_effect(variant) is None
        call = variant.step._call

        def noted(*args: Any) -> torch.Tensor:
            seen.add(threading.get_ident())
            return call(*args)

        monkeypatch.setattr(variant.step, "_call", noted)
        options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
        require_same(ask(serving(variant), **options), ask(model, **options))
        assert seen == {fake.owner.run(threading.get_ident)}
        five = torch.tensor(token_prompts(5))
        assert torch.equal(ask(serving(variant), five), ask(model, five)), "a batch nobody compiled for"
        with torch.inference_mode():
            assert torch.equal(ask(serving(variant)), ask(model))
        assert "captured or recorded already" in (GRAPH.unavailable(variant, CUDA) or "")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("no kernel for this"), TransformError("does not compile: RuntimeError: no kernel for this")),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), DeviceError("restart the process")),
    ],
)
def test_what_inductor_raises_is_a_refusal(
    error: Exception, raised: Exception, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InductorGraphStep, "_call", _raise(error))
    with pytest.raises(type(raised), match=str(raised)):
        Variant(tiny("llama")).with_transform(CompileStep(phase="decode", mode="reduce-overhead"))


@pytest.mark.parametrize(
    ("mode", "reason"), [("max-autotune", "Triton kernels"), ("reduce-overhead", "no graphs to capture")]
)
def test_modes_for_gpus_say_why_not_on_a_cpu(mode: str, reason: str) -> None:
    transform, variant = CompileStep(phase="decode", mode=mode), Variant(tiny("llama"))
    cpu = Hardware("cpu", "test", "AVX2", 1, 2**34, 25e9, {"float32": 1e11}, "g++", {})
    assert reason in (transform.unavailable(variant, cpu) or "")
    with pytest.raises(TransformError, match=reason):
        variant.with_transform(transform)


@pytest.mark.parametrize(
    ("there", "capability", "reason"),
    [(False, "9.0", "needs Triton"), (True, "6.1", "compute capability 7.0"), (True, "12.0", None)],
)
def test_compiling_for_a_gpu_needs_triton(
    there: bool, capability: str, reason: str | None, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if there else None)
    found = CompileStep(phase="decode").unavailable(Variant(tiny("llama")), replace(CUDA, capability=capability))
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_on_a_gpu_every_mode_decodes_the_same_tokens(mode: str) -> None:
    model, ids = tiny("llama").to("cuda"), IDS.to("cuda")
    plan = CompileStep(phase="decode", mode=mode)
    variant = Variant(model).with_transform(plan)
    for _ in range(2):
        assert torch.equal(ask(serving(variant), ids), ask(model, ids))
    assert plan.took_effect(variant) is None
