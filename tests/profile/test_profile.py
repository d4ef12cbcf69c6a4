"""What a profile says, on tiny real models: counts by hand, times only by their structure."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from math import inf, nan
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from autotune import profile, transforms
from autotune.diagnose.parts import ATTENTION, CACHE, COMPILED, FFN, HEAD, NORM, OTHER, OVERHEAD, sections
from autotune.diagnose.work import (
    Forward,
    Keys,
    Work,
    activation_dtype,
    attention_flops,
    attention_layers,
    cache_size,
    compute_dtype,
    count,
    matrices,
    query_heads_per_kv_head,
    stored_weights,
)
from autotune.errors import MeasurementError
from autotune.machine import compilers
from autotune.machine.hardware import Hardware
from autotune.model import seam
from autotune.model.linear_layers import stored_bytes
from autotune.profile.budget import Budget
from autotune.profile.operators import share, table
from autotune.profile.scaling import batch_scaling, context_growth, room
from autotune.profile.spans import Span, Trace, by_shape, mark_cache_writes, outside_forward
from autotune.profile.survey import median_prompts
from autotune.profile.timing import Stopwatch, time_request
from autotune.profile.tracing import trace, watched
from autotune.runtime import kernels
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.transforms.compile_step import CompileStep
from autotune.workload import PHASES, Workload
from tests import models
from tests.profile.crowded import Crowded

if TYPE_CHECKING:
    from autotune.diagnose.costs import Profile

CPU = Hardware("cpu", "a CPU", "AVX2", 2, 16 * 10**9, 25e9, {"float32": 140e9}, None, {})
PREFILL, DECODE = Forward(batch=1, new=12), Forward(batch=1, new=1, past=16)

# Elements of the matrices of one layer, hidden size 64, two layers, vocabulary 256; GPT-2's biases move, too.
LLAMA_ATTENTION, LLAMA_FFN = 64 * 64 + 2 * 64 * 32 + 64 * 64, 3 * 64 * 96
GPT2_ATTENTION, GPT2_FFN = 64 * 192 + 64 * 64, 2 * 64 * 256
GPT2_BIASES = 192 + 64 + 256 + 64
ROUTER, EXPERT, HEAD_SIZE = 64 * 4, 3 * 64 * 96, 64 * 256


def pairs(forward: Forward) -> int:
    return sum(forward.past + i for i in range(1, forward.new + 1))


def expected_flops(per_layer: int, forward: Forward) -> int:
    """Two per element and token, the head for one token, and 4 x 64 per query-key pair in each of two layers."""
    return 2 * 2 * per_layer * forward.new + 2 * HEAD_SIZE + 2 * 4 * 64 * pairs(forward)


@pytest.mark.parametrize("forward", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("architecture", "per_layer"),
    [
        ("llama", LLAMA_ATTENTION + LLAMA_FFN),
        ("gpt2", GPT2_ATTENTION + GPT2_FFN),
        ("mixtral", LLAMA_ATTENTION + ROUTER + 2 * EXPERT),  # two of four experts
    ],
)
def test_flops_as_counted_by_hand(architecture: str, per_layer: int, forward: Forward) -> None:
    model = models.tiny(architecture)
    work = count(model, forward, element_bytes=4)
    assert sum(part.flops for part in work.values()) == expected_flops(per_layer, forward)
    assert attention_flops(model, forward) == 2 * 4 * 64 * pairs(forward)


@pytest.mark.parametrize(
    ("window", "forward", "expected"),
    [
        (None, Forward(1, 4), 1 + 2 + 3 + 4),
        (None, Forward(1, 2, 5), 6 + 7),
        (3, Forward(1, 5), 1 + 2 + 3 + 3 + 3),
        (3, Forward(1, 3, 1), 2 + 3 + 3),
        (3, Forward(1, 2, 9), 3 + 3),
        (8, Forward(1, 0, 9), 0),
    ],
)
def test_query_key_pairs_under_a_causal_mask(window: int | None, forward: Forward, expected: int) -> None:
    assert Keys(heads=1, kv_heads=1, head_size=1, window=window).pairs(forward) == expected


def test_layers_whose_heads_differ_are_counted_one_by_one() -> None:
    """As Gemma 4's: wider heads, fewer of them for keys and values, where a layer sees everything."""
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    config.layer_types = ["sliding_attention", "full_attention"]
    config.sliding_window = 32
    try:
        config.per_layer_config = {1: {"head_dim": 64, "num_key_value_heads": 2}}
        config.is_heterogeneous  # noqa: B018
    except AttributeError:
        pytest.skip("layers of a model do not differ in this release")
    assert attention_layers(SimpleNamespace(config=config)) == [Keys(8, 4, 16, 32), Keys(8, 2, 64, None)]


@pytest.mark.parametrize(("architecture", "shared"), [("llama", 2.0), ("gpt2", 1.0), ("mamba", None)])
def test_query_heads_that_share_a_key_head(architecture: str, shared: float | None) -> None:
    assert query_heads_per_kv_head(models.tiny(architecture)) == shared


class Hidden(torch.nn.Module):
    """A layer that keeps its weight where torch does not look, as packed weights are kept."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = 64
        self.out_features = 96
        self.weight_bytes = 64 * 96 * dtype.itemsize
        self.dtype = dtype


PACKED = ("weight_only", {"bits": 8}, "decode")
BUILT = kernels.available() is None
INTEGERS = "int16" if BUILT and kernels.Int8Linear.from_weight(torch.ones(16, 32)).in_integers else "float32"
ARITHMETIC = [  # transforms, and what prefill and decode then compute in
    ((), "float32", "float32"),
    ((("weight_storage", {}, "decode"),), "float32", "float32"),
    ((PACKED,), "float32", INTEGERS),
    ((PACKED, ("packed_prefill", {}, "prefill")), INTEGERS, INTEGERS),
    ((PACKED, ("int8_activations", {}, "decode")), "float32", "int8"),
    ((("linear_bf16", {}, "prefill"),), "bfloat16", "float32"),
    ((PACKED, ("linear_bf16", {"weights": "decode"}, "prefill")), "bfloat16", INTEGERS),
    ((("linear_bf16x3", {}, "prefill"),), "bfloat16x3", "float32"),
]


@pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
@pytest.mark.parametrize(("parts", "prefill", "decode"), ARITHMETIC)
def test_layers_state_what_they_compute_in(parts: tuple[Any, ...], prefill: str, decode: str) -> None:
    chain = [transforms.make(*part) for part in parts]
    variant = Variant(models.tiny("llama"))
    if lacking := [why for t in chain if (why := getattr(t, "missing", lambda: None)())]:
        pytest.skip(lacking[0])
    variant = variant.with_transforms(chain)
    assert {phase: compute_dtype(m) for phase, m in variant.modules.items()} == {"prefill": prefill, "decode": decode}


@pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
def test_packed_layers_of_a_16_bit_model_do_not_compute_in_its_dtype() -> None:
    variant = Variant(models.tiny("llama").bfloat16()).with_transform(transforms.make(*PACKED))
    found = {phase: (compute_dtype(m), activation_dtype(m)) for phase, m in variant.modules.items()}
    assert found == {"prefill": ("bfloat16", torch.bfloat16), "decode": (INTEGERS, torch.bfloat16)}


def test_replaced_layers_count_as_they_state() -> None:
    model = models.tiny("llama")
    before, plain = stored_weights(model), count(model, DECODE, 4)[FFN]
    for layer in model.model.layers:
        layer.mlp.gate_proj = Hidden(torch.bfloat16)
        layer.mlp.up_proj = Hidden(torch.bfloat16)
    assert stored_weights(model) == before - 4 * 64 * 96 * 2
    replaced = count(model, DECODE, 4)[FFN]
    assert replaced.flops == plain.flops
    assert replaced.weight_bytes == plain.weight_bytes - 4 * 64 * 96 * 2
    assert (compute_dtype(model), activation_dtype(model)) == ("float32", torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj = Hidden(torch.bfloat16)
    model.lm_head = Hidden(torch.bfloat16)
    assert (compute_dtype(model), activation_dtype(model)) == ("bfloat16", torch.float32)


@pytest.mark.parametrize(
    ("architecture", "forward", "elements"),
    [
        ("llama", DECODE, 2 * (LLAMA_ATTENTION + LLAMA_FFN + 2 * 64) + 64 + HEAD_SIZE + 64),
        ("llama", PREFILL, 2 * (LLAMA_ATTENTION + LLAMA_FFN + 2 * 64) + 64 + HEAD_SIZE + 12 * 64),
        ("gpt2", DECODE, 2 * (GPT2_ATTENTION + GPT2_FFN + GPT2_BIASES + 4 * 64) + 2 * 64 + HEAD_SIZE + 2 * 64),
        ("mixtral", DECODE, 2 * (LLAMA_ATTENTION + ROUTER + 2 * EXPERT + 2 * 64) + 64 + HEAD_SIZE + 64),
    ],
)
def test_weight_bytes_as_counted_by_hand(architecture: str, forward: Forward, elements: int) -> None:
    work = count(models.tiny(architecture), forward, element_bytes=4)
    assert sum(part.weight_bytes for part in work.values()) == 4 * elements


def test_many_tokens_use_more_experts() -> None:
    model = models.tiny("mixtral")
    one, two = (count(model, Forward(batch, 1, 16), 4)[FFN].weight_bytes for batch in (1, 2))
    assert one == 4 * 2 * (ROUTER + 0.5 * 4 * EXPERT)
    assert two == 4 * 2 * (ROUTER + 0.75 * 4 * EXPERT)  # 1 - (1 - 2/4)^2 of them


def test_weights_move_once_for_a_batch_and_the_cache_for_every_sequence() -> None:
    model = models.tiny("llama")
    one, four = (count(model, Forward(batch, 1, 16), 4) for batch in (1, 4))
    assert four[ATTENTION].weight_bytes == one[ATTENTION].weight_bytes
    assert four[ATTENTION].cache_bytes == 4 * one[ATTENTION].cache_bytes
    assert four[FFN].flops == 4 * one[FFN].flops


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_cache_size_is_what_transformers_allocates(architecture: str) -> None:
    model = models.tiny(architecture)
    ids = torch.tensor(models.token_prompts(2, 24))  # longer than the sliding windows
    with torch.no_grad():
        out = model(ids, use_cache=True)
    cache = seam.cache_in(out)
    pairs = seam.keys_and_values(cache) if cache is not None and seam.counts_tokens(cache) else []
    held = sum(t.nbytes for pair in pairs for t in pair)
    assert cache_size(model, batch=2, tokens=24, element_bytes=4) == held


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_every_architecture_has_its_parts(architecture: str) -> None:
    model = models.tiny(architecture)
    found = sections(model)
    layers = {NORM: 1} if architecture == "mamba" else {NORM: 1, ATTENTION: 1, FFN: 1}
    for group, at_least in layers.items():
        in_layers = [name for name, g in found.items() if g == group and any(c.isdigit() for c in name)]
        assert len(in_layers) >= 2 * at_least, group
    assert [g for g in found.values() if g == HEAD] == [HEAD]


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral", "mamba"])
def measured(request: pytest.FixtureRequest) -> tuple[Variant, Profile]:
    variant = Variant(models.tiny(request.param))
    workload = Workload(tuple(map(tuple, models.token_prompts(3, 12))), new_tokens=8)
    return variant, profile.measure(variant, workload, CPU, budget_s=1.0, scaling=False)


@pytest.mark.filterwarnings("ignore")  # mamba names the kernels that it lacks
def test_the_operator_table_adds_up(measured: tuple[Variant, Profile]) -> None:
    variant, found = measured
    for phase in found.phases.values():
        assert sum(row.seconds for row in phase.operators) == pytest.approx(phase.seconds)
        assert sum(row.flops for row in phase.operators) == phase.flops
        assert sum(row.moved_bytes for row in phase.operators) == phase.moved_bytes
        assert all(row.seconds >= 0 for row in phase.operators)
        assert {row.bottleneck for row in phase.operators} <= {"compute", "memory", "overhead", "-"}
        rows = {row.group for row in phase.operators if row.seconds}
        assert {NORM, HEAD} <= rows
        if variant.original.config.model_type != "mamba":
            assert {ATTENTION, FFN, CACHE} <= rows


def test_a_phase_is_consistent(measured: tuple[Variant, Profile]) -> None:
    variant, found = measured
    assert set(found.phases) == set(PHASES)
    for phase in found.phases.values():
        assert phase.seconds == median(phase.samples_s)
        assert 0 <= phase.busy <= 1
        assert 0 < phase.linear_s <= phase.seconds
        assert phase.compute_dtype == "float32"
        assert phase.operator_count > 10
        assert 0 < phase.loop_s < phase.seconds
        assert 0 < phase.matmul_count < phase.operator_count
    assert found.prompt_tokens == 12
    assert (found.phases["decode"].cache_bytes == 0) == (variant.original.config.model_type == "mamba")


def test_weights_in_memory_are_exact(measured: tuple[Variant, Profile]) -> None:
    variant, found = measured
    tensors = [*variant.original.parameters(), *variant.original.buffers()]
    assert found.memory.weights_bytes == sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def test_a_phase_needs_its_own_weights_and_not_the_originals() -> None:
    original = Variant(models.tiny("llama"))
    whole = stored_weights(original.original)
    halved = original.with_transform(transforms.make("linear_dtype", {"dtype": "bfloat16"}, "decode"))
    workload = Workload(tuple(map(tuple, models.token_prompts(3, 12))), new_tokens=8)
    found = profile.measure(halved, workload, CPU, budget_s=1.0, scaling=False)
    assert found.phases["prefill"].stored_bytes == whole
    assert found.phases["decode"].stored_bytes < 0.8 * whole
    assert found.memory.weights_bytes > whole


def test_measuring_leaves_the_model_as_it_was(measured: tuple[Variant, Profile]) -> None:
    model = measured[0].original
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.generation_config.min_new_tokens


@pytest.mark.parametrize(
    ("room_bytes", "dtype", "batches"),
    [
        (10**9, torch.float32, (1, 2, 4)),
        (150_000, torch.float32, (1, 2)),  # a batch of 4 needs 156 kB of cache and activations
        (0, torch.float32, (1,)),  # requests of one sequence were made before
        (215_000, torch.bfloat16, (1, 2, 4)),  # 80 kB, and a copy of lm_head for each sequence
        (205_000, torch.bfloat16, (1, 2)),
    ],
)
def test_batches_grow_while_they_fit(room_bytes: int, dtype: torch.dtype, batches: tuple[int, ...]) -> None:
    prompt = torch.tensor(models.token_prompts(1, 12))
    model = models.tiny("llama").to(dtype)
    points = batch_scaling(serving(Variant(model)), prompt, (1, 2, 4), room_bytes, Budget(inf))
    assert tuple(point.batch for point in points) == batches
    assert all(point.tokens_per_s == point.batch / point.seconds_per_step for point in points)


def test_a_scan_never_decides_the_peak_of_tuning() -> None:
    variant = Variant(models.tiny("llama"))
    assert room(variant) == stored_bytes(variant.original) / 4


def test_contexts_grow_up_to_the_models_limit() -> None:
    points = context_growth(serving(Variant(models.tiny("llama"))), torch.tensor([[5, 6, 7]]), 10**9, Budget(inf))
    assert [point.context for point in points] == [64]  # 256 and the new tokens exceed the model's 256


def test_contexts_grow_while_they_fit() -> None:
    served = serving(Variant(models.tiny("llama", max_position_embeddings=2048)))
    for room_bytes, contexts in ((10**9, [64, 256, 1024]), (600_000, [64, 256]), (0, [64])):
        points = context_growth(served, torch.tensor([[5, 6, 7]]), room_bytes, Budget(inf))
        assert [point.context for point in points] == contexts


def test_no_scaling_without_time() -> None:
    served, prompt = serving(Variant(models.tiny("llama"))), torch.tensor([[5, 6, 7]])
    assert batch_scaling(served, prompt, (1,), 10**9, Budget(0.0)) == ()
    assert context_growth(served, prompt, 10**9, Budget(0.0)) == ()


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("plan", [None, "lean_loop", "static_cache"])
def test_a_token_that_is_timed_costs_what_a_token_that_is_served_does(plan: str | None) -> None:
    """No text ends early, because no token is one that ends texts: a least number of tokens would mask those each time.

    Without them the loop does not look for the end, either.
    """
    model, ids = models.tiny("llama"), torch.tensor(models.token_prompts(2, 12))
    model.generation_config.eos_token_id = [models.EOS]
    served = serving(Variant(model).with_transforms([transforms.make(plan, {}, "decode")] if plan else []))

    def four_tokens(ask: Callable[[int], object]) -> Counter[str]:
        counts = list[Counter[str]]()
        for tokens in (10, 6):
            with Operators() as seen:
                ask(tokens)
            counts.append(seen.counts)
        more, fewer = counts
        more.subtract(fewer)
        return more

    def ask(tokens: int, **options: Any) -> None:
        out = served.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, streamer=Stopwatch(), **options
        )
        assert out.shape[1] == 12 + tokens, "it ended early, so this shows nothing"

    time_request(served, ids, 10)  # allocates what stays
    timed = four_tokens(lambda tokens: time_request(served, ids, tokens))
    forced = four_tokens(lambda tokens: ask(tokens, min_new_tokens=tokens))
    assert timed["aten::mm"] == 4 * (2 * 7 + 1), "of every layer, and lm_head"
    assert timed <= four_tokens(ask)
    assert forced["aten::isin"] > timed["aten::isin"] == 0
    assert forced["aten::clone"] > timed["aten::clone"]


def test_the_wait_for_live_requests_is_no_part_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Crowded(*[1000.0] * 20)
    monkeypatch.setattr(time, "perf_counter", traffic.read)
    workload = Workload(tuple(map(tuple, models.token_prompts(1, 12))), new_tokens=8)
    found = profile.measure(Variant(models.tiny("llama"), traffic), workload, CPU, budget_s=0.1, scaling=False)
    assert len(traffic.waits_s) < 19, "it did not wait"
    assert found.phases["prefill"].seconds < 100


def test_the_wait_for_live_requests_is_no_part_of_a_trace() -> None:
    traffic = Crowded(0.0, 0.0)
    subject = watched(Variant(models.tiny("llama"), traffic))
    traces = trace(subject, torch.tensor(models.token_prompts(1)), 4, requests=2)
    assert not traffic.waits_s, "it did not wait"
    assert all(span.name != "eye" for found in traces.values() for span in found.spans)


def test_progress_names_every_step() -> None:
    variant, steps = Variant(models.tiny("llama")), list[str]()
    workload = Workload(tuple(map(tuple, models.token_prompts(1, 12))), new_tokens=8)
    profile.measure(variant, workload, CPU, budget_s=1.0, progress=steps.append)
    assert steps[:2] == ["warm-up", "prefill and decode, sample 1"]
    assert "operators" in steps


@pytest.mark.parametrize("name", ["gpt2", "llama"])  # whose positions are learned, whose are not
@pytest.mark.parametrize("scaling", [False, True])
def test_prompts_that_fill_the_context_leave_room_for_what_is_measured(name: str, scaling: bool) -> None:
    variant = Variant(models.tiny(name))
    full = Workload(tuple(map(tuple, models.token_prompts(2, models.CONTEXT - 1))), new_tokens=1)
    found = profile.measure(variant, full, CPU, budget_s=0.1, scaling=scaling)
    assert found.prompt_tokens == models.CONTEXT - 6


def test_prompts_are_of_the_median_length() -> None:
    workload = Workload(((1, 2), (3, 4, 5), (6, 7, 8, 9), (1, 1, 1, 1, 1), (2,)))
    assert median_prompts(workload, 4).tolist() == [[3, 4, 5], [6, 7, 8], [1, 1, 1], [3, 4, 5]]


def span(name: str, seconds: float = 1e-3, group: str = OTHER, role: str | None = None, works: bool = True) -> Span:
    return Span(name, seconds, group, role, works, outermost=True)


def test_keys_and_values_are_the_last_joined_before_attention() -> None:
    rotary = [span("cat", group=ATTENTION)] * 2
    writes = [span("cat", group=ATTENTION)] * 2
    core = span("scaled_dot_product_attention", group=ATTENTION, role="attention")
    outside = span("cat")
    layer = (*rotary, *writes, core)
    groups = [s.group for s in mark_cache_writes((outside, *layer, *layer, outside))]
    assert groups == [OTHER, *[ATTENTION, ATTENTION, CACHE, CACHE, ATTENTION] * 2, OTHER]


def test_time_that_no_operator_explains_is_the_frameworks() -> None:
    spans = (
        span("mm", 6e-3, FFN, "linear"),
        span("view", 5e-3, FFN, works=False),
        span("bmm", 1e-3, ATTENTION, "attention"),
        span("mul", 10e-6, NORM),
        span("cat", 0.5e-3, CACHE, "cache"),
        span("neg", 0.1e-3, ATTENTION),
    )
    found = share(Trace(spans, seconds=0.015), seconds=0.010)
    groups = {FFN: 6e-3, ATTENTION: 1.1e-3, CACHE: 0.5e-3, NORM: 10e-6, OVERHEAD: 2.39e-3}
    assert found.groups == pytest.approx(groups)
    assert (found.linear_s, found.attention_s, found.small_s) == pytest.approx((6e-3, 1e-3, 10e-6))
    assert found.around_attention_s == pytest.approx(0.6e-3)
    assert found.operator_count == 6


@pytest.mark.parametrize(
    ("forwards", "seconds"),
    [
        ([], nan),  # a recorded step has no modules
        ([(1.0, 4.0)], 2.0),
        ([(1.0, 2.0), (3.0, 4.5)], 2.5),
        ([(-3.0, -1.0), (5.0, 9.0)], nan),  # of other tokens
        ([(4.0, 7.0)], 4.0),  # it goes on after the token came out
    ],
)
def test_the_loop_is_what_is_outside_the_models_forwards(forwards: list[tuple[float, float]], seconds: float) -> None:
    assert outside_forward((0.0, 5.0), forwards) == pytest.approx(seconds, nan_ok=True)


@pytest.mark.parametrize(
    ("traced_s", "seconds", "linear_s", "overhead_s"),
    [
        (0.012, 0.010, 0.008, 0.002),  # the profiler's cost is not the model's
        (0.010, 0.020, 0.016, 0.004),  # the host was twice as slow while it was timed
        (0.010, 0.006, 0.0048, 0.0012),  # and here slower while it was traced
    ],
)
def test_a_trace_is_scaled_to_the_unprofiled_time(
    traced_s: float, seconds: float, linear_s: float, overhead_s: float
) -> None:
    found = share(Trace((span("mm", 0.008, FFN, "linear"),), traced_s), seconds)
    assert found.linear_s == pytest.approx(linear_s)
    assert found.groups[OVERHEAD] == pytest.approx(overhead_s, abs=1e-9)


def test_matmuls_that_a_compiler_fused_are_all_of_its_step() -> None:
    found = share(Trace((span("CompiledFxGraph", 0.008, COMPILED),), 0.010), 0.010)
    assert found.linear_s == pytest.approx(0.008)


@pytest.mark.parametrize(
    ("shapes", "group"),
    [
        ([[1, 64], [64, 96]], FFN),  # mm: x, weight transposed
        ([[96], [1, 64], [64, 96]], FFN),  # addmm: bias first
        ([[1, 1, 64], [96, 64]], FFN),  # linear: x, weight
        ([[1, 1, 96], [4, 96, 16], [4, 3, 16]], FFN),  # down, packed in blocks of 16 rows
        ([[1, 1, 64], [2, 8, 16], [2, 2, 16], [], []], ATTENTION),  # key, packed and 4 bits in 32
        ([[1, 64], [96, 8], [96, 2], [96, 2]], FFN),  # Triton's INT4: words, scales and zeros of groups
        ([[1, 64], [64, 8], [64, 2], [64, 2]], ATTENTION),  # as many outputs as inputs
        ([[1, 64], [96, 128], [96, 1]], FFN),  # Triton's INT8, inputs padded to a group
        ([[1, 64], [64, 96], [1, 1], [1, 96]], FFN),  # _scaled_mm: scales of rows and columns
        ([[1, 1024], [12, 8, 32, 4], [], [32, 96, 2]], FFN),  # tinygemm's INT4, inputs padded to 1024
        ([[1, 64], [64, 256]], HEAD),
        ([[1, 64], [64, 100]], None),
        ([[1, 64], []], None),
        (None, None),
    ],
)
def test_a_compiled_matmul_is_known_by_its_shape(shapes: list[list[int]] | None, group: str | None) -> None:
    assert by_shape(shapes or (), matrices([models.tiny("llama")])) == group


def test_what_a_compiler_fused_is_done_in_its_step() -> None:
    spans = (span("mm", 6e-3, FFN, "linear"), span("CompiledFxGraph", 2e-3, COMPILED))
    found = share(Trace(spans, 0.010), 0.010)
    rows = {row.group: row for row in table(found, {FFN: Work(10.0, 5.0), NORM: Work(0.0, 3.0)}, ridge=4.0)}
    assert set(rows) == {FFN, COMPILED, OVERHEAD}
    assert rows[COMPILED].moved_bytes == 3.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # the compiler on a loaded host
def test_a_compiled_step_is_attributed_without_its_modules() -> None:
    if compilers.path() is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    workload = Workload(tuple(map(tuple, models.token_prompts(1, 12))), new_tokens=8)
    variant = Variant(models.tiny("llama"), workload=workload).with_transform(CompileStep(phase="decode"))
    found = profile.measure(variant, workload, CPU, budget_s=1.0, scaling=False)
    for phase in PHASES:
        rows = {row.group: row for row in found.phases[phase].operators}
        assert (COMPILED in rows) == (phase == "decode")
        assert all(rows[group].seconds > 0 for group in (ATTENTION, FFN, HEAD))
        assert sum(row.seconds for row in rows.values()) == pytest.approx(found.phases[phase].seconds)


@pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
@pytest.mark.parametrize(
    "weights", [("weight_storage", {}), ("weight_only", {"bits": 8}), ("weight_only", {"bits": 4})]
)
@pytest.mark.parametrize("cache", [(), ("half_cache",)], ids=["FP32 slots", "FP16 slots"])
def test_a_recorded_steps_products_are_matmuls_in_every_arithmetic(
    weights: tuple[str, dict[str, Any]], cache: tuple[str]
) -> None:
    """Two layers of seven products, keys and values that are written, and attention; and lm_head."""
    chain = [transforms.make(*weights, "decode"), *(transforms.make(name, {}, "decode") for name in cache)]
    variant = Variant(models.tiny("llama")).with_transforms([*chain, transforms.make("step_program", {}, "decode")])
    spans = trace(watched(variant), torch.tensor(models.token_prompts(1)), 4)["decode"].spans
    assert sum(span.role == "linear" for span in spans) == 2 * 7 + 1
    assert sum(span.role == "attention" for span in spans) == 2
    assert sum(span.role == "cache" for span in spans) == 2 * 2 * (1 + len(cache))
    groups = {span.group for span in spans if span.role == "linear"}
    assert groups == {ATTENTION, FFN, HEAD}


def test_another_profiler_is_not_disturbed() -> None:
    subject = watched(Variant(models.tiny("llama")))
    with torch.autograd.profiler.profile(use_kineto=False), pytest.raises(MeasurementError, match="profiler"):
        trace(subject, torch.tensor(models.token_prompts(1, 4)), 2)


def test_a_budget_stops_before_a_step_that_would_not_fit() -> None:
    now = [0.0]
    budget = Budget(10.0, clock=lambda: now[0])
    assert budget.allows(growth=100)  # nothing has been measured yet
    with budget.step("one"):
        now[0] += 2.0
    assert budget.allows(growth=3.5)  # 7 s expected, 8 s left
    with budget.step("two"):
        now[0] += 4.0
    assert not budget.allows(growth=1.5)  # 6 s expected, 4 s left
    assert budget.part(0.5).left_s() == 2.0
