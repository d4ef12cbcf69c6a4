"""The C++ operators of prefill: numbers against FP64 for every shape, storage and stride."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from autotune.runtime.kernels import (
    Bf16Linear,
    HalfLinear,
    Int4Linear,
    Int6Linear,
    Int8Linear,
    attend_many,
    available,
    free_kept,
    no_bf16_unit,
)
from autotune.runtime.kernels.bf16 import FEW

OPERATORS = available()
needs_operators = pytest.mark.skipif(OPERATORS is not None, reason=str(OPERATORS))
BF16 = OPERATORS or no_bf16_unit()
needs_bf16 = pytest.mark.skipif(BF16 is not None, reason=str(BF16))

ERROR = {1: 6e-3, 2: 3e-5}  # parts -> relative error of a product
SHAPES = [(1, 1), (5, 8), (16, 32), (37, 100), (50, 33), (192, 576), (129, 260), (96, 1536)]  # N, K
TOKENS = [1, 15, 16, 17, 31, 32, 33, 100, 600]  # M
PACKED = [
    pytest.param(HalfLinear, {}, id="f16"),
    pytest.param(HalfLinear, {"dtype": torch.bfloat16}, id="bf16"),
    pytest.param(HalfLinear, {"dtype": torch.float32}, id="f32"),
    pytest.param(Int8Linear, {}, id="i8-32"),
    pytest.param(Int8Linear, {"group": 0}, id="i8-row"),
    pytest.param(Int6Linear, {}, id="i6-32"),
    pytest.param(Int4Linear, {}, id="i4-32"),
    pytest.param(Int4Linear, {"group": 128}, id="i4-128"),
]


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def exactly(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


@needs_bf16
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_bf16_operator(rows: int, inputs: int, bias: bool, parts: int) -> None:
    torch.manual_seed(rows * 1000 + inputs)
    weight, shift = torch.randn(rows, inputs), torch.randn(rows) if bias else None
    for tokens in TOKENS:
        x = torch.randn(tokens, inputs)
        for laid in (weight, weight.T.contiguous().T):  # as nn.Linear has it, and as Conv1D does
            y = torch.ops.autotune.linear_bf16(x, laid, None, None, shift, rows, parts)
            assert error(y, exactly(x, weight, shift)) <= ERROR[parts], tokens


@needs_bf16
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("rows", "inputs"), [(5, 8), (37, 100), (50, 33), (129, 260)])
@pytest.mark.parametrize(("kind", "options"), PACKED)
def test_bf16_layer_over_a_packed_one(kind, options, rows, inputs, parts) -> None:
    torch.manual_seed(rows)
    packed = kind.from_weight(torch.randn(rows, inputs), torch.randn(rows), **options)
    layer = Bf16Linear(packed, parts)
    for tokens in (2, 24, 77):
        x = torch.randn(3, tokens, inputs)
        assert error(layer(x), exactly(x, packed.dequantize(), packed.bias)) <= ERROR[parts], tokens
    assert layer.weight_bytes == packed.weight_bytes


@needs_bf16
@pytest.mark.parametrize("parts", [1, 2])
def test_bf16_layer_takes_any_leading_shape_stride_and_dtype(parts: int) -> None:
    linear = nn.Linear(72, 37).requires_grad_(False)
    layer, x = Bf16Linear(linear, parts), torch.randn(2, 30, 72)
    for same in (x, x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], -1)[..., 0]):
        assert error(layer(same), linear(x).double()) <= ERROR[parts]
    assert layer(torch.empty(2, 0, 72)).shape == (2, 0, 37)
    few = torch.randn(1, FEW - 1, 72)
    assert torch.equal(layer(few), linear(few))
    narrow = layer(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert error(narrow, linear(x).double()) <= 1e-2


@needs_bf16
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("kind", "options"), PACKED)
def test_the_last_part_of_a_prompt_is_multiplied_like_the_whole(kind, options, parts) -> None:
    """Prompts are computed in parts of 128 tokens beside others; their ends may be short, but not shorter than this."""
    torch.manual_seed(parts)
    layer = Bf16Linear(kind.from_weight(torch.randn(50, 72), **options), parts)
    x = torch.randn(130, 72)
    whole = layer(x)
    for tokens in (FEW, FEW + 1, 40, 64, 127):
        assert torch.equal(layer(x[-tokens:]), whole[-tokens:]), tokens


@needs_bf16
def test_bf16_layer_shares_its_weights() -> None:
    linear = nn.Linear(64, 48).requires_grad_(False)
    layer = Bf16Linear(linear)
    assert layer.weight is linear.weight
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert not list(layer.children())


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bf16_operator_is_the_same_with_any_number_of_threads(threads: int) -> None:
    x, weight = torch.randn(300, 96), torch.randn(70, 96)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.ops.autotune.linear_bf16(x, weight, None, None, None, 70, 1)
        torch.set_num_threads(threads)
        assert torch.equal(torch.ops.autotune.linear_bf16(x, weight, None, None, None, 70, 1), alone)
    finally:
        torch.set_num_threads(before)


@needs_operators
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.randn(40, 64), torch.randn(16, 32), None, None, None, 16, 1), "plain weight must be FP32"),
        ((torch.randn(40, 64), torch.randn(16, 64), None, None, None, 17, 1), "plain weight must be FP32"),
        ((torch.randn(40, 64), torch.randn(16, 64).half(), None, None, None, 16, 1), "plain weight must be FP32"),
        ((torch.randn(40, 64), torch.randn(16, 64), None, None, torch.randn(3), 16, 1), "bias has 3"),
        ((torch.randn(40, 64), torch.randn(16, 64), None, None, None, 16, 3), "parts is 1 or 2"),
        ((torch.randn(40, 64), torch.randn(2, 64, 16), None, None, None, 16, 1), "packed weights for 16 outputs"),
        ((torch.randn(40, 30), torch.randn(1, 64, 16), None, None, None, 16, 1), "number of inputs"),
    ],
)
def test_bf16_operator_refuses(arguments, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        torch.ops.autotune.linear_bf16(*arguments)


@pytest.mark.parametrize(
    ("layer", "parts", "says"), [(nn.Linear(8, 8).half(), 1, "FP32"), (nn.Linear(8, 8), 3, "parts must be")]
)
def test_bf16_layer_refuses(layer: nn.Linear, parts: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Bf16Linear(layer, parts)


PARTS = [0, *([] if BF16 else [1, 2])]
ATTENTION_ERROR = {0: 2e-6, 1: 2e-2, 2: 1e-4}
HEADS = [  # B, H, Hk, Q, D, value's D
    (1, 9, 3, 64, 64, 64),
    (2, 4, 2, 33, 16, 16),
    (1, 2, 1, 300, 80, 48),
    (2, 3, 3, 1, 8, 8),
    (1, 4, 4, 17, 20, 20),
    (1, 1, 1, 520, 128, 128),
]


def mask_of(kind: str, batch: int, queries: int, keys: int) -> Tensor:
    """Boolean [B, 1, Q, T]."""
    position, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    mask = (key <= position).expand(batch, 1, -1, -1).clone()
    if kind == "padded":
        mask[:1, :, :, : min(5, queries - 1)] = False
    if kind == "window":
        mask &= key > position - 40
    return mask


@needs_operators
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", ["causal", "padded", "window", "longer cache"])
@pytest.mark.parametrize(("batch", "heads", "key_heads", "queries", "depth", "value_depth"), HEADS)
def test_attention(batch, heads, key_heads, queries, depth, value_depth, kind, parts) -> None:
    torch.manual_seed(queries)
    keys = queries + 37 if kind == "longer cache" else queries
    q = torch.randn(batch, queries, heads, depth).transpose(1, 2)
    k, v = torch.randn(batch, key_heads, keys, depth), torch.randn(batch, keys, key_heads, value_depth).transpose(1, 2)
    mask = mask_of(kind, batch, queries, keys)
    spans = None if kind == "causal" else torch.ops.autotune.mask_spans(mask)
    y = attend_many(q, k, v, spans, 0.3, parts)  # [B, Q, H, D]
    repeated = (t.double().repeat_interleave(heads // key_heads, 1) for t in (k, v))
    exact = scaled_dot_product_attention(q.double(), *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
    seeing = mask.any(-1).transpose(1, 2)[..., None]  # [B, Q, 1, 1]
    assert not torch.where(seeing, 0.0, y).any(), "a query that sees nothing"
    assert error(torch.where(seeing, y, 0.0), torch.where(seeing, exact, 0.0)) <= ATTENTION_ERROR[parts]


@needs_operators
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_attention_with_flat_and_with_peaked_weights(scale: float) -> None:
    q, k, v = (torch.randn(1, 2, 400, 32) for _ in range(3))
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=scale)
    assert error(attend_many(q, k, v, None, scale), exact.transpose(1, 2)) <= 1e-4


@needs_operators
def test_attention_takes_and_returns_other_dtypes() -> None:
    q, k, v = (torch.randn(1, 2, 40, 32) for _ in range(3))
    y = attend_many(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 0.2)
    assert y.dtype == torch.bfloat16
    assert error(y, attend_many(q, k, v, None, 0.2).double()) <= 2e-2


@needs_operators
def test_spans_of_masks() -> None:
    mask = torch.tensor([[[[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]]]).bool()
    assert torch.ops.autotune.mask_spans(mask).tolist() == [[[0, 1], [1, 3], [4, 4], [2, 4]]]
    mask[0, 0, 1] = torch.tensor([True, False, True, False])
    assert torch.ops.autotune.mask_spans(mask).numel() == 0


@needs_operators
@pytest.mark.parametrize(
    ("keys", "spans", "parts", "says"),
    [
        (torch.randn(1, 3, 8, 16), None, 0, "divisor of H"),
        (torch.randn(1, 2, 9, 16), None, 0, "as many queries as keys"),
        (torch.randn(1, 2, 9, 16), torch.zeros(1, 8, 2), 0, "INT32"),
        (torch.randn(1, 2, 9, 16), torch.full((1, 8, 2), 10, dtype=torch.int32), 0, "beyond the 9 keys"),
        (torch.randn(1, 2, 8, 16), None, 3, "parts is 0, 1 or 2"),
    ],
)
def test_attention_refuses(keys: Tensor, spans: Tensor | None, parts: int, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        attend_many(torch.randn(1, 4, 8, 16), keys, keys, spans, 1.0, parts)


@needs_operators
def test_memory_that_threads_keep_from_call_to_call_is_freed() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(70, 96), Int8Linear.from_weight(torch.randn(32, 96))
    q, keys = torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16)
    calls = {  # each with the least that it lays out: a digit an input; keys and values in FP32, filled up to 32
        "linear": (lambda: layer(x), 70 * 96),
        "attend": (lambda: attend_many(q, keys, keys, None, 1.0), 2 * (2 * 96 * 32 * 4)),
    }
    free_kept()
    for name, (call, least) in calls.items():
        y = call()
        assert free_kept() >= least, name
        assert free_kept() == 0, name
        assert torch.equal(call(), y), name
