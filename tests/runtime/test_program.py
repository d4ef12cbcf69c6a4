"""Programs compute what torch computes, on any number of threads; their memory is reused only where nobody reads it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from autotune import transforms
from autotune.errors import TransformError
from autotune.model import seam
from autotune.runtime import kernels
from autotune.runtime.cache import slot_forward, slots
from autotune.runtime.cache.rows import RowCache
from autotune.runtime.dispatch import serving
from autotune.runtime.kernels.modules import GroupedLinear
from autotune.runtime.steps.program import Program, StepPrograms, layout
from autotune.runtime.steps.program.building import collapse
from autotune.runtime.steps.program.given import ModuleCalls
from autotune.runtime.steps.program.instruction import CODES, Instruction, Place, Root, Share, dense
from autotune.runtime.steps.program.lower import lower
from autotune.runtime.steps.program.trace import trace
from autotune.runtime.variant import Variant
from tests.models import VOCABULARY, left_padded, tiny, token_prompts
from tests.transforms.test_packed_prefill import CPU
from tests.transforms.test_weights import profile_of

needs_kernels = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
ARCHITECTURES = ("llama", "qwen3", "gpt2", "gpt-neox", "opt", "gemma3", "mistral-window", "phi3")
WEIGHTS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "as they are": None,
    "float16": ("weight_storage", {"dtype": "float16"}),
    "bfloat16": ("weight_storage", {"dtype": "bfloat16"}),
    "int8": ("weight_only", {"bits": 8}),
    "int6": ("weight_only", {"bits": 6}),
    "int4": ("weight_only", {"bits": 4}),
    "int4, whole rows": ("weight_only", {"bits": 4, "group": 0}),
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def record(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Program:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        graph = make_fx(function)(*(mode.from_tensor(t.clone()) for t in inputs))
    return Program(lower(graph, rows=inputs[0].shape[0]))


def run(program: Program, *inputs: torch.Tensor) -> torch.Tensor:
    output = program.room()
    program.run(program.addresses(inputs, output))
    return output


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-5) -> torch.Tensor:
    """As transformers' modules compute it."""
    return (ROW if weight is None else weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _turned(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rotation(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """As transformers' modules compute it."""
    return x * cosine + _turned(x) * sine


X, Y, ROW = floats(3, 5, 37), floats(3, 5, 37, seed=1), floats(37, seed=2)
IDS = torch.tensor([[3], [0], [6]])
TABLE, WEIGHT, BIAS = floats(7, 20, seed=3), floats(24, 37, seed=4), floats(24, seed=5)
BF16_TABLE, HALF_TABLE = TABLE.bfloat16(), TABLE.half()
FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "negative": (lambda x: -x, (X,)),
    "inverse_root": (lambda x: torch.rsqrt(x * x + 1), (X,)),
    "root": (lambda x: torch.sqrt(x * x), (X,)),
    "exp": (torch.exp, (X,)),
    "tanh": (torch.tanh, (X,)),
    "tanh of large numbers": (lambda x: torch.tanh(x * 100), (X,)),
    "sigmoid": (torch.sigmoid, (X * 30,)),
    "silu": (lambda x: F.silu(x), (X * 30,)),
    "relu": (lambda x: F.relu(x), (X,)),
    "gelu": (lambda x: F.gelu(x), (X,)),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), (X,)),
    "cos": (torch.cos, (X,)),
    "sin": (torch.sin, (X,)),
    "square": (lambda x: x.pow(2), (X,)),
    "cube": (lambda x: torch.pow(x, 3.0), (X,)),
    "reciprocal": (torch.reciprocal, (X,)),
    "add": (torch.add, (X, Y)),
    "add a row": (torch.add, (X, ROW)),
    "subtract": (lambda x, y: x - y, (X, Y)),
    "multiply by a number": (lambda x: 0.5 * x, (X,)),
    "divide": (lambda x, y: x / (y * y + 1), (X, Y)),
    "larger": (torch.maximum, (X, Y)),
    "smaller": (torch.minimum, (X, Y)),
    "transposed": (lambda x, y: x.transpose(1, 2) + y.transpose(1, 2), (X, Y)),
    "transposed and not": (lambda x, y: x.transpose(1, 2).contiguous() * y.reshape(3, 37, 5), (X, Y)),
    "broadcast": (lambda x, y: x[:, :, :1] * y[:, :1], (X, Y)),
    "sliced": (lambda x: torch.cat((-x[..., 18:], x[..., :18]), -1), (X,)),
    "norm": (lambda x: _norm(x), (X,)),
    "norm of a transposed": (lambda x: _norm(x.transpose(1, 2), ROW[:5] + 1), (X,)),
    "norm, its parts in other orders": (lambda x: torch.rsqrt(x.pow(2).mean(2, True) + 1e-3) * x * ROW, (X,)),
    "rotation": (lambda x, y: _rotation(x[..., :36], y[..., :36].cos(), y[..., 1:].sin()), (X, Y)),
    "rotation, its parts in other orders": (
        lambda x, y: y[:, :1, :36] * _turned(x[..., :36]) + y[..., 1:] * x[..., :36],
        (X, Y),
    ),
    "gated by SiLU": (lambda x, y: F.silu(x) * y, (X * 30, Y)),
    "gated by GELU": (lambda x, y: y * F.gelu(x, approximate="tanh"), (X, Y)),
    "gated, transposed": (lambda x, y: F.silu(x.transpose(1, 2)) * y.transpose(1, 2), (X, Y)),
    "mean": (lambda x: x.mean(-1, keepdim=True) * x, (X,)),
    "mean of a transposed": (lambda x: x.transpose(1, 2).mean(-1), (X,)),
    "layer norm": (lambda x, y: F.layer_norm(x, (37,), y, y * 2, 1e-5), (X, ROW)),
    "layer norm without weights": (lambda x: F.layer_norm(x, (37,)), (X,)),
    "embedding": (lambda ids: F.embedding(ids, TABLE), (IDS,)),
    "embedding in bfloat16": (lambda ids: F.embedding(ids, BF16_TABLE).float(), (IDS,)),
    "embedding in float16": (lambda ids: F.embedding(ids, HALF_TABLE).float(), (IDS,)),
    "to float16 and back": (lambda x: (x * ROW).half().float(), (X * 2.0 ** torch.arange(-26, 11),)),
    "linear": (lambda x: F.linear(x, WEIGHT, BIAS), (X,)),
    "products over one number": (lambda x, y: x[:, :, :1] @ y[:, :1], (X, Y)),
    "linear without bias": (lambda x: F.linear(x, WEIGHT), (X,)),
    "constants": (lambda x: x * torch.arange(37) + torch.full((37,), 2.0), (X,)),
    "one input twice": (lambda x: (x + 1) * (x + 1), (X,)),
    "an input itself": (lambda x: x.transpose(1, 2), (X,)),
    "ids side by side": (lambda ids: torch.cat((ids, ids + 1), -1).float(), (IDS,)),
    "to float": (lambda ids: (ids * 3 - 1 + ids).float(), (IDS,)),
}
MASKS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "less": lambda a, b: a < b,
    "at most": lambda a, b: a <= b,
    "more": lambda a, b: a > b,
    "at least": lambda a, b: a >= b,
    "equal": lambda a, b: a == b,
    "and": lambda a, b: (a < 4) & (b > 2),
    "not": lambda a, b: ~(a < b),
    "side by side": lambda a, b: torch.cat((a[:, :4] < b, a[:, 4:] <= b), -1),
    "or": lambda a, b: (a < 2) | (b > 5),
}


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_computes_what_torch_computes(name: str, count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    function, inputs = FUNCTIONS[name]
    program = record(function, *inputs)
    for scale in (1, 2):  # other numbers through the same program
        given = [t * scale if t.is_floating_point() else t for t in inputs]
        torch.testing.assert_close(run(program, *given), function(*given), atol=2e-6, rtol=2e-5)


@needs_kernels
@pytest.mark.parametrize("function", [torch.maximum, torch.minimum])
def test_nan_is_not_lost_among_larger_and_smaller_numbers(function: Any) -> None:
    nan, one, two = torch.nan, 1.0, 2.0
    a, b = torch.tensor([[nan, one, two, nan]]), torch.tensor([[one, nan, one, nan]])
    torch.testing.assert_close(run(record(function, a, b), a, b), function(a, b), equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, lambda x: F.silu(x), torch.exp, torch.relu])
def test_nan_stays_nan(function: Any) -> None:
    """The cap of logits is a tanh: NaN would become the likeliest token of all."""
    x = torch.tensor([[torch.nan, 1.0, -2.0, torch.nan] * 9])
    torch.testing.assert_close(run(record(function, x), x), function(x), equal_nan=True)


def _norm_read_twice(x: torch.Tensor) -> torch.Tensor:
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return ROW * scaled + scaled


def _gate_read_twice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    gate = F.silu(x)
    return gate * y + gate


EVEN = X[..., :36].contiguous(), Y[..., :36].contiguous()
PATTERNS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...], str | None]] = {
    "norm": (lambda x: _norm(x), (X,), "rms"),
    "norm, weight and one": (lambda x: _norm(x, 1 + ROW), (X,), "rms"),
    "norm, weight given": (lambda x, y: _norm(x, y[0, 0]), (X, Y), None),
    "norm, weight for each row": (lambda x: _norm(x, X[0]), (X,), None),
    "norm, the scaled read twice": (_norm_read_twice, (X,), None),
    "norm of another's mean": (lambda x, y: ROW * (x * torch.rsqrt(y.pow(2).mean(-1, True) + 1e-5)), (X, Y), None),
    "norm of means that are given": (lambda x: ROW * (x * torch.rsqrt(x.pow(2).mean(-1, True))), (X,), None),
    "norm of cubes": (lambda x: ROW * (x * torch.rsqrt(x.pow(3).mean(-1, True) + 9.0)), (X,), None),
    "rotation": (lambda x, y: _rotation(x, y.cos(), y.sin()), EVEN, "rotate"),
    "rotation, the second half first": (
        lambda x, y: x * y + torch.cat((x[..., 18:], -x[..., :18]), -1) * y.cos(),
        EVEN,
        None,
    ),
    "rotation, halves exchanged": (
        lambda x, y: x * y + torch.cat((-x[..., :18], x[..., 18:]), -1) * y.cos(),
        EVEN,
        None,
    ),
    "rotation of something else": (lambda x, y: x * y.cos() + _turned(y) * y.sin(), EVEN, None),
    "rotation of other parts": (
        lambda x, y: x * y + torch.cat((-x[..., 18:], x[..., 1:19]), -1) * y.cos(),
        EVEN,
        None,
    ),
    "rotation by a gate": (lambda x, y: x * F.silu(y) + _turned(x) * y.sin(), EVEN, "rotate"),
    "gate": (lambda x, y: F.silu(x) * y, (X, Y), "gate_silu"),
    "gate, GELU": (lambda x, y: F.gelu(x, approximate="tanh") * y, (X, Y), "gate_gelu_tanh"),
    "gate, GELU without tanh": (lambda x, y: F.gelu(x) * y, (X, Y), None),
    "gate, read twice": (_gate_read_twice, (X, Y), None),
    "gate of one row": (lambda x, y: F.silu(x) * y[:1], (X, Y), None),
}


@needs_kernels
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_one_instruction_and_others_are_not(name: str) -> None:
    function, inputs, code = PATTERNS[name]
    program = record(function, *inputs)
    codes = [instruction.code for instruction in program.instructions]
    together = {"rms", "rotate", "gate_silu", "gate_gelu_tanh"}
    assert together & set(codes) == ({code} if code else set())
    left = {"silu"} if name == "rotation by a gate" else set()  # which is not a part of it
    assert code is None or {"inverse_root", "negative", "silu", "gelu_tanh"} & set(codes) == left
    torch.testing.assert_close(run(program, *inputs), function(*inputs), atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    a, b = torch.arange(8).expand(2, 8).contiguous(), torch.tensor([[3], [5]])
    query, cache = floats(2, 2, 1, 16), floats(2, 1, 8, 16)

    def attend(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.ops.autotune.attend_one(query, cache, cache, None, MASKS[name](a, b)[:, None, None], 0.25)

    program = record(attend, a, b)
    torch.testing.assert_close(run(program, a, b), attend(a, b))


@needs_kernels
@pytest.mark.parametrize(
    ("function", "inputs", "named"),
    [
        (lambda x: torch.fft.fft(x).real, (X,), "fft"),
        (lambda x: x.pow(1.7), (X,), "powers of 1.7"),
        (lambda x: x.mean(0), (X,), "means over other dimensions"),
        (lambda x: x.half() + 1, (X,), "float16"),
        (lambda x, y: x[:, 0] @ y[0, 0], (X, Y), "mv"),
        (lambda x, y: x @ y.transpose(1, 2), (X, Y), "products over 37 numbers"),
        (lambda x: torch.cat((x.half(), x.half()), -1).float(), (X,), "this use of aten.cat"),
        (lambda x: x.mean(-1, dtype=torch.float32), (X,), "this use of aten.mean"),
        (lambda x: torch.addmm(WEIGHT[:, 0], x[:, 0], WEIGHT.T, beta=2), (X,), "this use of aten.addmm"),
    ],
)
def test_what_has_no_instruction_is_named(function: Any, inputs: tuple[torch.Tensor, ...], named: str) -> None:
    with pytest.raises(TransformError, match=named):
        record(function, *inputs)


@needs_kernels
def test_an_index_outside_its_table_is_an_error() -> None:
    program = record(lambda ids: F.embedding(ids, TABLE), IDS)
    with pytest.raises(RuntimeError, match="outside its table"):
        run(program, torch.tensor([[3], [7], [6]]))


@needs_kernels
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((X.half(), Y), "input 0 of the program is torch.float16, and was recorded as torch.float32"),
        ((X, Y.double()), "input 1 of the program is torch.float64"),
        ((X, Y[:2]), r"input 1 .* of shape \[2, 5, 37\]"),
        ((X, Y.transpose(0, 2).contiguous().transpose(0, 2)), "input 1 .* of strides"),
        ((X, Y.to_sparse()), "input 1 .* not strided memory of the CPU"),
        ((X, Y.to("meta")), "input 1 .* not strided memory of the CPU"),
        ((X,), "2 inputs, not 1"),
        ((X, Y, ROW), "2 inputs, not 3"),
    ],
)
def test_what_was_not_recorded_is_refused(given: tuple[torch.Tensor, ...], says: str) -> None:
    program = record(torch.add, X, Y)
    with pytest.raises(TransformError, match=says):
        program.addresses(given, program.room())
    torch.testing.assert_close(run(program, X, Y), X + Y)


@needs_kernels
def test_strides_of_single_elements_do_not_matter() -> None:
    program = record(torch.add, X[:1], Y[:1])
    odd = Y.as_strided((1, 5, 37), (7, 37, 1))
    torch.testing.assert_close(run(program, X[:1], odd), X[:1] + odd)


@needs_kernels
def test_weights_whose_memory_was_freed_are_not_read() -> None:
    weight = WEIGHT.clone()
    program = record(lambda x: F.linear(x, weight), X)
    program.addresses((X,), program.room())
    weight.untyped_storage().resize_(0)
    with pytest.raises(TransformError, match="weights have moved"):
        program.addresses((X,), program.room())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_arithmetic_in_another_default_dtype_is_refused(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with pytest.raises(TransformError, match=str(dtype)):
            record(lambda ids: ids * 0.5, IDS)
    finally:
        torch.set_default_dtype(before)


@needs_kernels
@pytest.mark.parametrize(("limit", "refused"), [(2, "where"), (2.5, "gt")])  # as an integer, 2.5 would be 2
def test_a_position_compared_with_a_fraction_is_refused(limit: float, refused: str) -> None:
    with pytest.raises(TransformError, match=f"no instruction for aten.{refused}"):
        record(lambda ids: torch.where(ids > limit, 1.0, 0.0), IDS)


@needs_kernels
def test_more_dimensions_than_the_loops_hold_are_refused() -> None:
    x, y = floats(2, 3, 2, 3, 2, 3), floats(3, 2, 3, 2, 3, 2, seed=1)
    with pytest.raises(TransformError, match="over 6 dimensions"):
        record(lambda x, y: x + y.permute(5, 4, 3, 2, 1, 0), x, y)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "batch", "weights", "digits"),
    [(name, batch, "int8", 0) for name in ARCHITECTURES for batch in (1, 3)]
    + [("llama", batch, weights, 0) for weights in WEIGHTS for batch in (1, 9)]
    + [("llama", batch, weights, 2) for weights in WEIGHTS if "int" in weights for batch in (1, 9)],
)
def test_a_recorded_step_gives_the_modules_logits(name: str, batch: int, weights: str, digits: int) -> None:
    """In integers, a last bit that differs before a product moves a rounded input by a step."""
    model = tiny(name)
    chosen = WEIGHTS[weights]
    before = [] if chosen is None else [transforms.make(*chosen, "decode")]
    reference = Variant(model).with_transforms([*before, transforms.make("one_query_attention", {}, "decode")])
    module = reference.modules["decode"]
    compute_in(module, digits)
    tolerance = 2e-4 if digits == 0 else 2e-3
    prompt = torch.tensor(token_prompts(batch, length=11))
    filled = seam.growing_cache()
    model(prompt, **seam.over(model, filled))
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    caches = [slots.SlotCache(filled, 64) for _ in range(2)]
    for cache in caches:
        cache.fill(filled, mask)
    recorded = _steps(module, caches[0])
    for i in range(12):  # past the sliding windows of 8
        token = torch.tensor(token_prompts(batch, length=1, seed=i))
        position = torch.full((batch, 1), 11 + i)
        expected = slot_forward.step(module, token, position, caches[1])
        torch.testing.assert_close(recorded(token, position, caches[0]), expected, atol=tolerance, rtol=tolerance / 2)
        for cache in caches:
            cache.advance()


def compute_in(module: torch.nn.Module, digits: int) -> None:
    for layer in module.modules():
        if isinstance(layer, GroupedLinear):
            layer.digits = digits


def _steps(module: Any, cache: slots.SlotCache) -> Callable[..., torch.Tensor]:
    return StepPrograms(module).fitting(cache)


def by_make_fx(module: Any, cache: slots.SlotCache, given: Any) -> Any:
    """The graph of a step as torch's own tracer records it."""
    token = torch.zeros(cache.valid.shape[0], 1, dtype=torch.int64)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def step(*inputs: Any) -> torch.Tensor:
        *known, extra = inputs
        with given.returning(extra):
            return slot_forward.run(module, *known)

    with torch.no_grad(), mode:
        fake = mode.from_tensor
        known = [fake(t) for t in (token, token.clone(), cache.slot, cache.valid)]
        more = [[fake(t) for t in each] for each in (cache.keys, cache.values, given.tensors)]
        return make_fx(step, tracing_mode="real")(*known, *more)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_recorded_graph_is_that_of_torchs_own_tracer(name: str, rows: int) -> None:
    """It gives the same program over the same weights."""
    module = _packed(name).modules["decode"]
    filled = seam.growing_cache()
    module(torch.tensor(token_prompts(1, length=5)), **seam.over(module, filled))
    cache = RowCache(filled, 32, rows)
    ours, theirs = (
        Program(lower(record(module, cache, ModuleCalls(module, cache)), rows)) for record in (trace, by_make_fx)
    )
    assert torch.equal(ours._code, theirs._code)
    constants = [each._weights for each in (ours, theirs)]
    assert all(map(torch.equal, *constants))


def _packed(name: str) -> Variant:
    plan = [("weight_only", {"bits": 8}), ("one_query_attention", {})]
    return Variant(tiny(name)).with_transforms([transforms.make(*each, "decode") for each in plan])


@needs_kernels
@pytest.mark.parametrize("weights", [w for w in WEIGHTS.values() if w is not None], ids=str)
def test_a_packed_embedding_is_part_of_the_program(weights: tuple[str, dict[str, Any]]) -> None:
    packed = [transforms.make(*weights, "both"), transforms.make("packed_embedding", {}, "both")]
    plain = Variant(tiny("llama")).with_transforms(packed)
    recorded = Variant(plain.original).with_transforms([*packed, transforms.make("step_program", {}, "decode")])
    inputs = left_padded()
    assert torch.equal(
        *(serving(v).generate(**inputs, max_new_tokens=24, min_new_tokens=24) for v in (plain, recorded))
    )


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name != "gemma3"]
)  # it scales embeddings in 16 bits
def test_a_16_bit_models_step_is_that_of_the_same_weights_in_fp32(name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan = [transforms.make("weight_only", {"bits": 8}, "decode"), transforms.make("step_program", {}, "decode")]
    narrow = Variant(model).with_transforms(plan)
    wide = Variant(tiny(name).to(dtype).float()).with_transforms(plan)
    prompt = torch.tensor(token_prompts(2, length=11))
    filled = seam.growing_cache()
    model(prompt, **seam.over(model, filled))
    logits = []
    for variant in (narrow, wide):
        assert variant.step is not None
        cache = slots.SlotCache(filled, 64, dtype=torch.float32)
        cache.fill(filled, None)
        steps = variant.step.fitting(cache)
        for i in range(3):
            token = torch.tensor(token_prompts(2, length=1, seed=i))
            logits.append(steps(token, torch.full((2, 1), 11 + i), cache))
            cache.advance()
    for one, other in zip(logits[:3], logits[3:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@needs_kernels
def test_a_packed_embedding_gives_a_16_bit_models_step_its_own_rows() -> None:
    """In FP32, as they are in memory, while prefill has them in the model's dtype."""
    from autotune.runtime.kernels import PackedTable

    plan = [transforms.make("weight_only", {}, "both"), transforms.make("packed_embedding", {}, "both")]
    variant = Variant(tiny("llama").bfloat16()).with_transforms([*plan, transforms.make("step_program", {}, "decode")])
    tables = [variant.modules[phase].get_input_embeddings() for phase in ("prefill", "decode")]
    assert all(isinstance(table, PackedTable) for table in tables)
    assert [table.dtype for table in tables] == [torch.bfloat16, torch.float32]
    assert tables[0].weight is tables[1].weight
    assert any(i.code == "embed_packed" for i in variant.step.program(1).instructions)


@needs_kernels
def test_a_16_bit_model_answers_in_its_own_dtype() -> None:
    model = tiny("llama").bfloat16()
    plan = [transforms.make("weight_only", {"bits": 8}, "decode"), transforms.make("step_program", {}, "decode")]
    served = serving(Variant(model).with_transforms(plan))
    ids = torch.tensor(token_prompts(1, length=11))
    asked: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True}
    expected, got = (each.generate(ids, attention_mask=torch.ones_like(ids), **asked) for each in (model, served))
    for one, other in zip(*(seam.keys_and_values(seam.cache_in(out)) for out in (expected, got)), strict=True):
        assert [t.dtype for t in other] == [t.dtype for t in one] == [torch.bfloat16] * 2
        assert [t.shape for t in other] == [t.shape for t in one]


@needs_kernels
def test_a_16_bit_matrix_that_is_not_packed_is_refused() -> None:
    plan = [
        transforms.make("weight_only", {"bits": 8, "skip": "layers.1.mlp.up_proj"}, "decode"),
        transforms.make("step_program", {}, "decode"),
    ]
    with pytest.raises(TransformError, match=r"layers\.1\.mlp\.up_proj\.weight is torch\.bfloat16: pack its layer"):
        Variant(tiny("llama").bfloat16()).with_transforms(plan)


@needs_kernels
@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_generation_is_the_originals(name: str, sampling: bool) -> None:
    model = tiny(name)
    exact = [transforms.make("weight_storage", {}, "decode"), transforms.make("step_program", {}, "decode")]
    served = serving(Variant(model).with_transforms(exact))
    for inputs in (left_padded(), {"input_ids": torch.tensor(token_prompts(1))}, left_padded((20, 3))):
        answers = []
        for each in (model, served):
            torch.manual_seed(7)
            answers.append(each.generate(**inputs, max_new_tokens=24, do_sample=sampling))
        assert torch.equal(*answers)


@needs_kernels
def test_a_timed_step_knows_its_instructions() -> None:
    variant = Variant(tiny("llama")).with_transforms(
        [transforms.make("weight_only", {}, "decode"), transforms.make("step_program", {}, "decode")]
    )
    steps = variant.step
    assert isinstance(steps, StepPrograms)
    served, ids = serving(variant), torch.tensor(token_prompts(1))
    served.generate(ids, max_new_tokens=3)
    program = steps.program(1)
    assert program is not None
    assert program.times() == []
    with steps.timed():
        served.generate(ids, max_new_tokens=3)
    spent = program.times()
    assert {i.matrix for i, _ in spent} - {None} == {(64, 64), (64, 32), (64, 96), (96, 64), (64, VOCABULARY)}
    assert all(seconds >= 0 for _, seconds in spent)
    assert sum(seconds for _, seconds in spent) > 0


@needs_kernels
def test_contexts_up_to_the_models_limit_are_served() -> None:
    model = tiny("llama")
    variant = Variant(model).with_transform(transforms.make("step_program", {}, "decode"))
    assert variant.caches is not None
    assert variant.caches.slots == model.config.max_position_embeddings
    ids = torch.tensor(token_prompts(1, length=200))
    expected = model.generate(ids, max_new_tokens=56, min_new_tokens=56)
    assert torch.equal(serving(variant).generate(ids, max_new_tokens=56, min_new_tokens=56), expected)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "reason"),
    [("mixtral", r"recorded|instruction"), ("gpt2", "one row after the other"), ("mamba", "does not take")],
)
def test_what_cannot_be_a_program_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(TransformError, match=reason):
        Variant(tiny(name)).with_transform(transforms.make("step_program", {}, "decode"))


@pytest.mark.parametrize(
    ("shape", "strides", "keep_first", "keep_last", "sizes", "steps"),
    [
        ((2, 3, 4), [(12, 4, 1)], False, False, [24], [[1]]),
        ((2, 3, 4), [(12, 4, 1)], True, False, [2, 12], [[12], [1]]),
        ((2, 3, 4), [(12, 4, 1)], False, True, [6, 4], [[4], [1]]),
        ((2, 3, 4), [(12, 4, 1), (0, 0, 1)], False, False, [6, 4], [[4, 0], [1, 1]]),
        ((1, 1, 4), [(4, 4, 1)], False, False, [4], [[1]]),
        ((1, 1), [(1, 1)], False, False, [1], [[0]]),
        ((3, 2, 4), [(4, 12, 1)], False, False, [3, 2, 4], [[4], [12], [1]]),
    ],
)
def test_dimensions_collapse_where_all_step_evenly(
    shape: Any, strides: Any, keep_first: bool, keep_last: bool, sizes: list[int], steps: list[list[int]]
) -> None:
    expected = sizes, [list(own) for own in zip(*steps, strict=True)]
    assert collapse(shape, strides, keep_first, keep_last) == expected


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (1, 5, 1)])
def test_dense_strides_are_torchs(shape: tuple[int, ...]) -> None:
    assert dense(shape) == torch.empty(shape).stride()


SHARES = st.sampled_from(list(Share))
STEPS = st.lists(
    st.tuples(SHARES, st.lists(st.integers(0, 30), max_size=3), st.integers(1, 900)), min_size=1, max_size=25
)


def chain(steps: list[tuple[Share, list[int], int]]) -> tuple[list[Instruction], list[Root]]:
    """Instructions that each write a new temporary and read some of those before."""
    roots = [Root(i, "temporary", size) for i, (_, _, size) in enumerate(steps)]
    instructions = [
        Instruction("copy", share, (), frozenset(r for r in reads if r < i), frozenset({i}))
        for i, (share, reads, _) in enumerate(steps)
    ]
    return instructions, roots


@given(STEPS)
@settings(deadline=None)
def test_threads_meet_between_a_write_and_a_foreign_read(steps: list[tuple[Share, list[int], int]]) -> None:
    instructions, _ = chain(steps)
    meets = layout.meetings(instructions)
    for i, instruction in enumerate(instructions):
        for j in instruction.reads:
            own = instructions[j].share is instruction.share is not Share.TEAM
            assert own or any(meets[j + 1 : i + 1])


@given(STEPS)
@settings(deadline=None)
def test_memory_is_reused_only_when_nobody_can_be_reading_it(steps: list[tuple[Share, list[int], int]]) -> None:
    instructions, roots = chain(steps)
    meets = layout.meetings(instructions)
    offsets, end = layout.place_temporaries(instructions, meets, roots)
    users = {r.number: [i for i, x in enumerate(instructions) if r.number in x.reads | x.writes] for r in roots}
    for a in roots:
        assert offsets[a.number] + a.size_bytes <= end
        for b in roots[a.number + 1 :]:
            apart = (
                offsets[a.number] + a.size_bytes <= offsets[b.number]
                or offsets[b.number] + b.size_bytes <= offsets[a.number]
            )
            born = users[b.number][0]
            alone = instructions[born].share is Share.SOLO
            over = all(
                j < born and ((alone and instructions[j].share is Share.SOLO) or any(meets[j + 1 : born + 1]))
                for j in users[a.number]
            )
            assert apart or over


def test_instructions_are_encoded_with_their_length_in_front() -> None:
    place = Place(Root(0, "temporary", 64), 2, (4,), (1,), torch.float32)
    instruction = Instruction(
        "negative", Share.SOLO, (1, 4, place.ref, 1, place.ref, 1), frozenset({0}), frozenset({0})
    )
    words = layout.encode([instruction], [False], {0: 128}).tolist()
    assert words == [1, 12, CODES.index("negative"), 0, 0, 1, 4, layout.ARENA, 136, 1, layout.ARENA, 136, 1]


@needs_kernels
def test_every_instruction_occurs_in_some_tested_graph() -> None:
    used: set[str] = set()
    for function, inputs in FUNCTIONS.values():
        used |= {i.code for i in record(function, *inputs).instructions}
    a, b = torch.arange(8)[None].contiguous(), torch.tensor([[3]])
    query, cache = floats(1, 2, 1, 16), floats(1, 1, 8, 16)
    for mask in MASKS.values():

        def attend(a: torch.Tensor, b: torch.Tensor, mask: Any) -> torch.Tensor:
            return torch.ops.autotune.attend_one(query, cache, cache, None, mask(a, b)[:, None, None], 1.0)

        used |= {i.code for i in record(functools.partial(attend, mask=mask), a, b).instructions}
    model = tiny("llama", vocab_size=VOCABULARY)
    variant = Variant(model).with_transforms(
        [
            transforms.make("weight_only", {"bits": 4}, "decode"),
            transforms.make("packed_embedding", {}, "decode"),
            transforms.make("step_program", {}, "decode"),
        ]
    )
    assert isinstance(variant.step, StepPrograms)
    used |= {i.code for step in variant.step._steps.values() for i in step.program.instructions}
    layer = kernels.Int8Linear.from_weight(WEIGHT)
    for layer.digits in (0, 2):
        used |= {i.code for i in record(layer, floats(3, WEIGHT.shape[1])).instructions}
    missing = set() if torch.ops.autotune.least_digits(8) else {"round", "linear_rounded"}
    assert set(CODES) - used == missing


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """All threads of this process on one CPU: whoever waits for another is in its way."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not tell threads where to run")
    tasks, allowed = Path("/proc/self/task"), os.sched_getaffinity(0)

    def stay_on(cpus: set[int]) -> None:
        for thread in tasks.iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), cpus)

    stay_on({min(allowed)})
    yield
    stay_on(allowed)


@needs_kernels
@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_team_that_is_held_up_goes_on_with_fewer_and_computes_the_same(
    count: int, threads: Callable[[int], None], one_cpu: None
) -> None:
    weight = floats(64, 64, seed=6) / 8

    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):  # every product is of all that the others computed
            x = F.linear(x, weight)
        return x

    x = floats(1, 64)
    program, sizes = record(deep, x), list[int]()
    output = program.room()
    addresses = program.addresses([x], output)
    threads(1)
    program.run(addresses)
    alone = output.clone()
    threads(count)
    for _ in range(30):
        output.zero_()
        program.run(addresses)
        assert torch.equal(output, alone)
        sizes.append(torch.ops.autotune.team_size(count))
    assert program.meetings >= 39
    assert min(sizes) < count


@needs_kernels
@pytest.mark.parametrize(
    ("members", "held_up_ms", "passed_ms", "usual_ms", "expected"),
    [
        (2, 0.9, 1.0, 0, 2),  # less than a time slice
        (2, 1.6, 1.6, 0, 1),
        (2, 1.6, 1.6, 4, 1),
        (2, 1.6, 1.6, 27, 2),  # the other thread came 1.6 ms late to a program of 27
        (2, 10, 20, 27, 1),
        (2, 10, 31, 27, 2),  # less than a third of the time
        (8, 10, 20, 27, 6),
        (3, 10, 20, 27, 2),
    ],
)
def test_a_team_shrinks_when_waits_cost_more_than_a_thread(
    members: int, held_up_ms: float, passed_ms: float, usual_ms: float, expected: int
) -> None:
    times = (int(1e6 * ms) for ms in (held_up_ms, passed_ms, usual_ms))
    assert torch.ops.autotune.next_team_size(members, *times) == expected


@needs_kernels
@pytest.mark.parametrize(
    ("lost", "expected"),
    [  # programs of two threads; one that loses a thread, x
        ("...x....", "22221222"),
        ("x" + 17 * "." + ".x..", "21" + 17 * "2" + "212"),  # each comes alone
        ("x.x.........", "212111122222"),  # the second is soon after the first
        ("x.x....x..........", "212111121111111122"),  # and a third
        ("x.x....." + 16 * "." + "x...", "2121111" + 17 * "2" + "2122"),  # calm between
    ],
)
def test_all_threads_are_tried_again_soon_after_a_lone_interruption(lost: str, expected: str) -> None:
    told = torch.ops.autotune.team_sizes(torch.tensor([each == "x" for each in lost]), 2)
    assert "".join(f"{size:.0f}" for size in told.tolist()) == expected


@pytest.mark.parametrize(("dtype", "least", "most"), [("bfloat16", 2.0, 3.0), ("float32", 2.0, 3.0)])
def test_it_promises_kernels_of_its_own_in_fp32(dtype: str, least: float, most: float) -> None:
    """132 ms a token, nearly all in matmuls over 1 GB: at 20 GB/s they take 50 ms, computed in FP32."""
    profile = profile_of(0.128, 0.004, weight_bytes=1e9, flops=1e9, compute_dtype=dtype)
    promised = transforms.make("step_program", {}, "decode").predict(profile, CPU)["decode"]
    assert least < promised < most


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell")
def test_slots_never_lie_in_huge_pages() -> None:
    """Which the first token of every head would fill: of a batch of 8, gigabytes."""
    room = slots._room(torch.zeros(1, 4, 1, 64), rows=8, slots=32768, dtype=torch.float32)
    assert room.shape == (8, 4, 32768, 64)
    room[:, :, 0] = 1.0
    assert float(room[7, 3, :2].sum()) == 64.0
    start = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
    inside, found = False, dict[str, str]()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (at := start.match(line)) is not None:
            inside = int(at[1], 16) <= room.data_ptr() < int(at[2], 16)
        elif inside:
            name, _, value = line.partition(":")
            found[name] = value
    assert "nh" in found["VmFlags"].split()
    assert int(found["Rss"].split()[0]) < 4 * 8 * 4 + 64, "kB: a page for each head of each row"


@pytest.mark.parametrize("shape", [(0, 4, 16, 8), (2, 3, 0, 8)])
def test_no_room_is_room_for_nothing(shape: tuple[int, int, int, int]) -> None:
    rows, heads, count, size = shape
    assert slots._room(torch.zeros(1, heads, 1, size), rows, count, torch.float32).shape == shape
