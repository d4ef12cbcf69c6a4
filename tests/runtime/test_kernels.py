"""The C++ operators: numbers against FP64, shapes, tracing, and every way in which building them can fail."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.pytorch_utils import Conv1D

from autotune.runtime import kernels
from autotune.runtime.kernels import (
    HalfLinear,
    Int4Linear,
    Int6Linear,
    Int8Linear,
    PackedLinear,
    arena,
    attend_one,
    available,
    build,
    pack,
)
from autotune.runtime.kernels.modules import GroupedLinear, QuantisedLinear
from tests.surroundings import without_threads

SENTENCE = available()
needs_operators = pytest.mark.skipif(SENTENCE is not None, reason=str(SENTENCE))

FORMATS = [
    pytest.param(HalfLinear, {}, 4e-4, id="f16"),
    pytest.param(HalfLinear, {"dtype": torch.bfloat16}, 4e-3, id="bf16"),
    pytest.param(HalfLinear, {"dtype": torch.float32}, 0.0, id="f32"),
    pytest.param(Int8Linear, {}, 8e-3, id="i8-32"),
    pytest.param(Int8Linear, {"group": 64}, 9e-3, id="i8-64"),
    pytest.param(Int8Linear, {"group": 128}, 1e-2, id="i8-128"),
    pytest.param(Int8Linear, {"group": 0}, 1.2e-2, id="i8-row"),
    pytest.param(Int6Linear, {}, 0.025, id="i6-32"),
    pytest.param(Int6Linear, {"group": 64}, 0.028, id="i6-64"),
    pytest.param(Int6Linear, {"group": 0}, 0.04, id="i6-row"),
    pytest.param(Int4Linear, {}, 0.09, id="i4-32"),
    pytest.param(Int4Linear, {"group": 64}, 0.1, id="i4-64"),
    pytest.param(Int4Linear, {"group": 128}, 0.12, id="i4-128"),
    pytest.param(Int4Linear, {"group": 0}, 0.14, id="i4-row"),
]
SHAPES = [(1, 1), (5, 8), (16, 32), (37, 100), (50, 33), (192, 576), (129, 260)]  # N, K
# digits of the inputs -> largest error relative to the largest output; see GroupedLinear
DIGITS = {0: 3e-6, 1: 3e-2, 2: 1e-4}


def digits_of(bits: int) -> list[int]:
    """Digits of the products in integers that this processor has over weights of so many bits."""
    least = 0 if SENTENCE else torch.ops.autotune.least_digits(bits)
    return [digits for digits in (1, 2) if 0 < least <= digits]


IN_INTEGERS = [
    pytest.param(kind, digits, id=f"{kind.__name__}-{digits}")
    for kind, bits in ((Int8Linear, 8), (Int6Linear, 6), (Int4Linear, 4))
    for digits in digits_of(bits)
]
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 48, 49, 130]  # M


def close(actual: Tensor, exact: Tensor, tolerance: float = 3e-6) -> bool:
    """Whether FP32 results agree with FP64 ones relative to the largest."""
    return bool((actual.double() - exact).abs().max() <= tolerance * exact.abs().max())


def packed(
    kind: type[HalfLinear | QuantisedLinear], options: dict[str, object], rows: int, inputs: int, bias: bool
) -> PackedLinear:
    torch.manual_seed(rows * 1000 + inputs)
    return kind.from_weight(torch.randn(rows, inputs) / 8, torch.randn(rows) if bias else None, **options)


def precisions(layer: PackedLinear) -> Iterator[float]:
    """Let a layer compute in each way that it can here, and yield the error that this may have."""
    if not isinstance(layer, GroupedLinear):
        yield DIGITS[0]
        return
    for digits in (0, *digits_of(layer.bits)):
        layer.digits = digits
        yield DIGITS[digits]


@pytest.mark.parametrize(("kind", "options", "error"), FORMATS)
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_packing_loses_no_more_than_the_format_must(kind, options, error, rows, inputs) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(rows, inputs)
    restored = kind.from_weight(weight, **options).dequantize()
    assert restored.shape == weight.shape
    assert (restored - weight).norm() <= error * weight.norm()


@needs_operators
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
@pytest.mark.parametrize(("kind", "options", "_error"), FORMATS)
def test_linear_equals_its_dequantized_weight(kind, options, _error, rows, inputs, bias) -> None:
    layer = packed(kind, options, rows, inputs, bias)
    weight = layer.dequantize().double()
    for tokens in TOKENS:
        x = torch.randn(tokens, inputs)
        exact = x.double() @ weight.T + (layer.bias.double() if bias else 0)
        for tolerance in precisions(layer):
            assert close(layer(x), exact, tolerance), tokens


@needs_operators
@pytest.mark.parametrize(("kind", "options", "_error"), FORMATS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_linear_is_the_same_with_any_number_of_threads(kind, options, _error, threads) -> None:
    layer = packed(kind, options, 700, 576, True)
    x = torch.randn(3, 576)
    before = torch.get_num_threads()
    try:
        for _ in precisions(layer):
            torch.set_num_threads(1)
            alone = layer(x)
            torch.set_num_threads(threads)
            assert torch.equal(layer(x), alone)
    finally:
        torch.set_num_threads(before)


@needs_operators
@pytest.mark.parametrize(("kind", "options", "_error"), FORMATS)
def test_a_token_is_the_same_to_the_bit_whoever_is_computed_with_it(kind, options, _error) -> None:
    """So an answer does not depend on the other callers' whose tokens a step computes."""
    layer = packed(kind, options, 129, 576, True)
    x = torch.randn(64, 576)
    for _ in precisions(layer):
        alone = torch.cat([layer(x[t : t + 1]) for t in range(len(x))])
        for tokens in [*range(2, 18), 31, 64]:
            assert torch.equal(layer(x[:tokens]), alone[:tokens]), f"{tokens} tokens"
            assert torch.equal(layer(x[-tokens:]), alone[-tokens:]), f"the last {tokens} tokens"


needs_integers = pytest.mark.skipif(not IN_INTEGERS, reason="no products in integers here")


@needs_integers
@pytest.mark.parametrize(("kind", "digits"), IN_INTEGERS)
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e20])
def test_inputs_of_any_size_are_rounded_alike(kind, digits, size) -> None:
    layer = packed(kind, {}, 37, 96, False)
    layer.digits = digits
    x = torch.randn(5, 96)
    exact = (x * size).double() @ layer.dequantize().double().T
    assert close(layer(x * size), exact if size > 1e-30 else torch.zeros(1).double(), DIGITS[digits])
    one_large = x.clone()
    one_large[:, 40] = 1e4  # coarsens its own span of 32 inputs, and no other
    assert close(layer(one_large), one_large.double() @ layer.dequantize().double().T, DIGITS[digits])


@needs_integers
@pytest.mark.parametrize(("kind", "digits"), IN_INTEGERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_input_that_is_not_finite_spoils_its_own_token(kind, digits, bad) -> None:
    layer = packed(kind, {}, 37, 96, False)
    layer.digits = digits
    x = torch.randn(40, 96)
    good = layer(x)
    x[3, 50] = bad
    y = layer(x)
    assert not torch.isfinite(y[3]).any()
    assert torch.equal(y[:3], good[:3])
    assert torch.equal(y[4:], good[4:])


@needs_integers
@pytest.mark.parametrize(("kind", "digits"), IN_INTEGERS)
def test_the_largest_weights_and_inputs_do_not_overflow(kind, digits) -> None:
    layer = kind.from_weight(torch.full((16, 4096), 3.0), group=0)
    layer.digits = digits
    x = torch.full((3, 4096), -2.0)
    assert close(layer(x), x.double() @ layer.dequantize().double().T, DIGITS[digits])


def test_digits_that_there_are_not_are_refused() -> None:
    layer = Int8Linear.from_weight(torch.randn(16, 32))
    layer.digits = 3
    with pytest.raises(RuntimeError, match="digits is 0"):
        layer(torch.randn(1, 32))


@needs_operators
@pytest.mark.parametrize(("kind", "options", "_error"), FORMATS)
def test_linear_takes_any_leading_shape_stride_and_dtype(kind, options, _error) -> None:
    layer = packed(kind, options, 37, 72, True)
    x = torch.randn(2, 3, 72)
    expected = layer(x.reshape(6, 72)).view(2, 3, 37)
    for same in (x, x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], -1)[..., 0]):
        assert torch.allclose(layer(same), expected, atol=1e-5)
    assert torch.allclose(layer(x[0, 0]), expected[0, 0], atol=1e-5)
    assert layer(torch.empty(2, 0, 72)).shape == (2, 0, 37)
    for dtype in (torch.float16, torch.bfloat16):
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        assert torch.allclose(y.float(), expected, atol=0.05)


@needs_operators
@pytest.mark.parametrize(("kind", "options", "_error"), FORMATS)
@pytest.mark.parametrize("inputs", [8, 256, 576])
def test_linear_refuses_the_wrong_number_of_inputs(kind, options, _error, inputs) -> None:
    layer = packed(kind, options, 16, 288, False)
    with pytest.raises(RuntimeError, match="number of inputs"):
        layer(torch.randn(1, inputs))


@needs_operators
def test_linear_takes_linear_and_conv1d() -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 48), Conv1D(48, 64)
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        assert torch.allclose(HalfLinear.from_linear(linear)(x), linear(x), atol=1e-3)
        assert torch.allclose(HalfLinear.from_weight(conv.weight.T, conv.bias)(x), conv(x), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (HalfLinear, {}, 64 * 96 * 2),
        (Int8Linear, {}, 64 * 96 + 64 * 3 * 2),
        (Int6Linear, {}, 64 * 96 * 3 // 4 + 64 * 3 * 2),
        (Int4Linear, {}, 64 * 96 // 2 + 2 * 64 * 3 * 2),
        (Int4Linear, {"group": 0}, 64 * 96 // 2 + 2 * 64 * 2),
    ],
)
def test_weight_bytes_count_weights_scales_and_bias(kind, options, expected) -> None:
    assert kind.from_weight(torch.randn(64, 96), **options).weight_bytes == expected
    assert kind.from_weight(torch.randn(64, 96), torch.randn(64), **options).weight_bytes == expected + 256


@pytest.mark.parametrize("kind", [HalfLinear, Int8Linear, Int6Linear, Int4Linear])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(3), r"\[N, K\]"),
        (torch.zeros(0, 8), r"\[N, K\]"),
        (torch.zeros(8, 8, dtype=torch.int8), "floating-point"),
        (torch.full((4, 8), torch.inf), "fit|infinity"),
        (torch.full((4, 8), torch.nan), "fit|NaN"),
    ],
)
def test_packing_refuses_what_it_cannot_hold(kind, weight, message) -> None:
    with pytest.raises(ValueError, match=message):
        kind.from_weight(weight)


@pytest.mark.parametrize("group", [-8, 12, 33])
@pytest.mark.parametrize("quantize", [pack.quantize_i8, pack.quantize_i6, pack.quantize_i4])
def test_packing_refuses_odd_groups(quantize, group) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        quantize(torch.randn(4, 64), group)


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-30, 1.0, 1e6])
@pytest.mark.parametrize(("kind", "error"), [(Int8Linear, 8e-3), (Int6Linear, 0.035), (Int4Linear, 0.09)])
def test_quantizing_keeps_its_precision_at_any_magnitude(kind, error, size) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64) * size
    assert (kind.from_weight(weight).dequantize() - weight).norm() <= error * weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", [pack.quantize_i8, pack.quantize_i6, pack.quantize_i4])
def test_a_large_table_is_widened_and_quantised_in_parts(quantize, dtype, monkeypatch) -> None:
    """The embedding of a vocabulary of 150 000 in FP32 is larger than the rest of a small model."""
    torch.manual_seed(0)
    weight, rows, grouped = torch.randn(100, 40).to(dtype), list[int](), pack._grouped
    whole, halves = quantize(weight), pack.pack_half(weight)
    monkeypatch.setattr(pack, "PART", 16 * 40)
    monkeypatch.setattr(pack, "_grouped", lambda part, group: rows.append(len(part)) or grouped(part, group))
    for expected, got in zip(whole, quantize(weight), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    assert set(rows) == {16, 4}
    assert torch.equal(pack.pack_half(weight), halves)


def test_six_bits_are_packed_in_order() -> None:
    numbers = torch.randint(-32, 32, (48, 200), generator=torch.Generator().manual_seed(0)).float()
    numbers[:, ::8] = -32.0
    blocks = pack.interleave([numbers.to(torch.int8)], 48, 200)
    packed = pack.narrow_i6(blocks)
    assert packed.dtype is torch.int16
    assert packed.shape == (3, 75, 16)
    ones = torch.ones(3, 1, 16)
    assert torch.equal(pack.dequantize_i6(packed, ones, 48, 200), numbers)
    if SENTENCE is None:
        x = torch.eye(200)
        for digits in (0, *digits_of(6)):
            y = torch.ops.autotune.linear_i6(x, packed, ones, None, 48, digits)
            assert torch.allclose(y, numbers.T, rtol=1e-4), digits


def test_constant_groups_are_exact() -> None:
    weight = torch.full((16, 64), 0.25)
    assert torch.equal(Int4Linear.from_weight(weight).dequantize(), weight)


@pytest.mark.parametrize("size", [1, 1000, arena.CHUNK_BYTES - 100, arena.CHUNK_BYTES, arena.CHUNK_BYTES + 7])
def test_tensors_in_huge_pages_are_aligned_and_apart(size) -> None:
    tensors = [arena.empty((size,), torch.int8, torch.device("cpu")) for _ in range(3)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert tensor.shape == (size,)
        assert tensor.data_ptr() % arena.ALIGN_BYTES == 0
        assert (tensor == number).all()


ATTENTION = [  # B, H, Hk, D, slots, length
    (1, 9, 3, 64, 256, 1),
    (1, 9, 3, 64, 256, 100),
    (2, 8, 2, 80, 300, 299),
    (3, 4, 4, 20, 64, 17),
    (1, 8, 1, 128, 128, 128),
    (2, 5, 1, 3, 70, 65),
    (1, 2, 2, 64, 2048, 1500),
]


def padding(batch: int, slots: int, length: int) -> Tensor:
    """[B, 1, 1, slots], row b padded on the left by 5 b slots."""
    first = torch.clamp(5 * torch.arange(batch), max=length - 1)
    return (torch.arange(slots) >= first[:, None])[:, None, None, :]


@needs_operators
@pytest.mark.parametrize("masked", ["no", "bool", "float", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "heads", "key_heads", "depth", "slots", "length"), ATTENTION)
def test_attend_one_equals_sdpa(batch, heads, key_heads, depth, slots, length, dtype, masked) -> None:
    torch.manual_seed(length)
    q = torch.randn(batch, heads, 1, depth)
    keys, values = torch.randn(2, batch, key_heads, slots, depth).to(dtype)
    keys[:, :, length:] = values[:, :, length:] = torch.nan  # what is not filled must not be read
    keep = padding(1 if masked == "shared" else batch, slots, length)
    mask = {"no": None, "float": torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)}.get(masked, keep)
    y = attend_one(q, keys, values, torch.tensor(length), mask, 0.3)
    exact = scaled_dot_product_attention(
        q.double(),
        keys[:, :, :length].double(),
        values[:, :, :length].double(),
        attn_mask=None if mask is None else keep[..., :length],
        scale=0.3,
        enable_gqa=True,
    )
    assert y.shape == (batch, 1, heads, depth)
    assert close(y, exact.transpose(1, 2))


@needs_operators
@pytest.mark.parametrize("scale", [0.01, 10.0, 1000.0])
def test_attend_one_is_stable_for_large_scores(scale) -> None:
    torch.manual_seed(1)
    q, keys, values = torch.randn(1, 4, 1, 32), torch.randn(1, 4, 200, 32), torch.randn(1, 4, 200, 32)
    exact = scaled_dot_product_attention(q.double(), keys.double(), values.double(), scale=scale).transpose(1, 2)
    assert close(attend_one(q, keys, values, torch.tensor([200]), None, scale), exact, 3e-4)


@needs_operators
def test_attend_one_with_nothing_to_attend_to_is_zero() -> None:
    q, keys, values = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 70, 32), torch.randn(2, 2, 70, 32)
    mask = padding(2, 70, 70)
    mask[1] = False
    y = attend_one(q, keys, values, torch.tensor(70), mask, 1.0)
    assert torch.isfinite(y).all()
    assert (y[1] == 0).all()
    assert (y[0] != 0).all()
    assert (attend_one(q, keys, values, torch.tensor(0), None, 1.0) == 0).all()


@needs_operators
def test_attend_one_reads_strided_caches() -> None:
    torch.manual_seed(2)
    q, both = torch.randn(1, 4, 1, 32).half(), torch.randn(1, 50, 2, 2, 32)
    keys, values = both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2)
    y = attend_one(q, keys, values, torch.tensor(50), None, 0.2)
    same = attend_one(q.float(), keys.contiguous(), values.contiguous(), torch.tensor(50), None, 0.2)
    assert y.dtype == torch.float16
    assert torch.equal(y, same.half())


@needs_operators
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 4, 2, 32)}, "one query"),
        ({"q": torch.randn(1, 3, 1, 32)}, "divisor of H"),
        ({"keys": torch.randn(1, 2, 50, 16)}, "divisor of H"),
        ({"values": torch.randn(1, 2, 50, 32).half()}, "one dtype"),
        ({"length": torch.tensor(51)}, "exceeds 50 slots"),
        ({"length": torch.tensor(5.0)}, "INT64"),
        ({"mask": torch.ones(1, 1, 1, 40, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(1, 1, 1, 50, dtype=torch.int32)}, "mask"),
    ],
)
def test_attend_one_refuses(change, message) -> None:
    call = {
        "q": torch.randn(1, 4, 1, 32),
        "keys": torch.randn(1, 2, 50, 32),
        "values": torch.randn(1, 2, 50, 32),
        "length": torch.tensor(50),
        "mask": None,
        "scale": 1.0,
    }
    with pytest.raises(RuntimeError, match=message):
        attend_one(**{**call, **change})


class Block(nn.Module):
    """Every operator once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(64, 64) / 8
        self.layers = nn.ModuleList(
            [kind.from_weight(weight) for kind in (HalfLinear, Int8Linear, Int6Linear, Int4Linear)]
        )

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
        q, gate, up, shift = (layer(x) for layer in self.layers)
        y = attend_one(q.view(1, 1, 4, 16).transpose(1, 2), keys, values, length, None, 0.25)
        return y.reshape(1, 1, 64) + torch.nn.functional.silu(gate) * up + shift


@needs_operators
@pytest.mark.slow
def test_operators_trace_into_one_graph_that_serves_every_length() -> None:
    block = Block()
    x, keys, values = torch.randn(1, 1, 64), torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32, 16)
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    with torch.inference_mode(), torch.compiler.set_stance("default"):
        compiled(x, keys, values, torch.tensor(3))
        with torch.compiler.set_stance("fail_on_recompile"):
            for length in (4, 5, 32):
                filled = torch.tensor(length)
                assert torch.allclose(
                    compiled(x, keys, values, filled), block(x, keys, values, filled), rtol=1e-5, atol=1e-6
                )


@needs_operators
@pytest.mark.parametrize("kind", [Int8Linear, Int6Linear, Int4Linear])
def test_fake_shapes_agree_with_real_ones(kind) -> None:
    layer = kind.from_weight(torch.randn(24, 64), torch.randn(24))
    operator = getattr(torch.ops.autotune, layer.operator).default
    arguments = (torch.randn(2, 64), *layer.stored, layer.bias, 24)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_operators
def test_attention_s_fake_shapes_agree_with_real_ones() -> None:
    cache = torch.randn(1, 2, 8, 16)
    attended = (torch.randn(1, 4, 1, 16), cache, cache.clone(), torch.tensor(8), None, 1.0)
    torch.library.opcheck(
        torch.ops.autotune.attend_one.default, attended, test_utils=("test_schema", "test_faketensor")
    )


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def compiler(directory: Path, body: str) -> str:
    """A stand-in compiler that answers --version and does `body` otherwise."""
    file = directory / "compiler"
    file.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo stand-in\n{body}\n')
    file.chmod(0o755)
    return str(file)


@pytest.mark.fault("A16")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "echo 'x.cpp:1:1: error: no such thing' >&2; exit 1",
            "could not compile the operators: x.cpp:1:1: error: no such thing",
        ),
        ("exit 3", "it said nothing"),
        ("exit 0", "could not be compiled"),
        ('for last; do :; done; echo rubbish > "$last"', "do not load"),
    ],
)
def test_a_failing_compiler_is_a_sentence(tmp_path, monkeypatch, body, message) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, body))
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match=message) as caught:
        build.load()
    assert "\n" not in str(caught.value)
    assert not [left for left in (tmp_path / "cache/kernels").iterdir() if left.is_dir()]


def test_a_library_that_does_not_load_is_not_compiled_again(tmp_path, monkeypatch) -> None:
    calls = tmp_path / "calls"
    body = f"""echo >> {calls}; for last; do :; done; echo rubbish > "$last\""""
    monkeypatch.setenv("CXX", compiler(tmp_path, body))
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(build.BuildError, match="do not load"):
            build.load()
        compiled = calls.read_text()
        calls.write_text("")
    assert compiled == ""


def test_a_version_in_another_encoding_is_one(tmp_path) -> None:
    file = tmp_path / "compiler"
    file.write_bytes(b"#!/bin/sh\nprintf 'M\\374nchen in %s' $LC_ALL\n")
    file.chmod(0o755)
    assert build._version([str(file)]).endswith("in C")


@pytest.mark.fault("A17")
def test_a_compiler_that_hangs_is_stopped(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "exec sleep 60"))
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "TIMEOUT_S", 0.05)
    with pytest.raises(build.BuildError, match=r"within 0 s"):
        build.load()


def test_a_cache_without_room_is_a_sentence(tmp_path, monkeypatch) -> None:
    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(build.BuildError, match=r"could not be compiled: .*No space left"):
        build.load()
    monkeypatch.setattr(kernels, "_outcome", [])
    assert "No space left" in (kernels.available() or "")


def test_no_thread_to_compile_in_is_a_sentence(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "_outcome", [])
    with monkeypatch.context() as full:
        without_threads(full)
        assert "could not be compiled: can't start new thread" in (kernels.available() or "")


@pytest.mark.fault("A16")
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": "", "CXX": ""}, "no C\\+\\+ compiler: c\\+\\+, g\\+\\+"),
        ({"CXX": "nonesuch -x"}, "nonesuch is not on PATH"),
        ({"CXX": 'g++ -DNAME="x'}, 'CXX is g\\+\\+ -DNAME="x, which is no command'),
    ],
)
def test_no_compiler_is_a_sentence(monkeypatch, environment, message) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(build.BuildError, match=message):
        build.load()


def test_another_cache_directory_in_the_same_process_is_no_second_registration(tmp_path) -> None:
    """Which aborts the process."""
    code = (
        "import os, pathlib, shutil; from autotune.runtime.kernels import build; first = build.load();"
        f"other = pathlib.Path({str(tmp_path)!r}, 'kernels'); other.mkdir(0o700); shutil.copy(first, other);"
        f"os.environ['AUTOTUNE_CACHE_DIR'] = {str(tmp_path)!r}; print(build.load() == other / first.name != first)"
    )
    assert python(code).stdout.strip() == "True"


def test_available_says_why_not() -> None:
    done = python(
        "from autotune.runtime import kernels; print(kernels.available()); print(kernels.available())", CXX="nonesuch"
    )
    first, second = done.stdout.splitlines()
    assert first == second
    assert "no C++ compiler: nonesuch" in first


@pytest.mark.fault("A29")
def test_an_unwritable_cache_costs_one_warning(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo error: reached >&2; exit 1"))
    with caplog.at_level(logging.WARNING, "autotune"):
        for _ in range(2):
            with pytest.raises(build.BuildError, match="reached"):
                build.load()
    assert len([record for record in caplog.records if "AUTOTUNE_CACHE_DIR" in record.message]) == 1


NARROW = """
import torch
from torch.nn.functional import scaled_dot_product_attention
from autotune.runtime import kernels

assert kernels.available() is None, kernels.available()
torch.set_num_threads(1)
torch.manual_seed(0)
for kind, options in [
    (kernels.HalfLinear, {}),
    (kernels.HalfLinear, {"dtype": torch.bfloat16}),
    (kernels.HalfLinear, {"dtype": torch.float32}),
    (kernels.Int8Linear, {}),
    (kernels.Int8Linear, {"group": 0}),
    (kernels.Int6Linear, {}),
    (kernels.Int4Linear, {}),
]:
    for rows, inputs in [(37, 100), (192, 576)]:
        layer = kind.from_weight(torch.randn(rows, inputs), torch.randn(rows), **options)
        for tokens in (1, 2, 5, 8, 17, 64):
            x = torch.randn(tokens, inputs)
            exact = x.double() @ layer.dequantize().double().T + layer.bias
            for digits, tolerance in ((2, 1e-4), (0, 5e-6)):  # in integers where there are any
                layer.digits = digits
                assert (layer(x) - exact).abs().max() < tolerance * exact.abs().max(), (kind, options, rows, tokens)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for depth in (64, 20):
        q, cache = torch.randn(2, 9, 1, depth), torch.randn(2, 2, 3, 100, depth).to(dtype)
        mask = torch.rand(2, 1, 1, 90) > 0.2
        y = kernels.attend_one(q, *cache, torch.tensor(90), mask, 0.2)
        keys, values = cache[..., :90, :].double()
        exact = scaled_dot_product_attention(q.double(), keys, values, mask, scale=0.2, enable_gqa=True).transpose(1, 2)
        assert (y - exact).abs().max() < 1e-5
"""


@needs_operators
@pytest.mark.slow
@pytest.mark.parametrize("march", ["x86-64", "haswell"])
def test_a_narrow_cpu_gets_the_same_numbers(tmp_path, march) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("names of x86 instruction sets")
    done = python(NARROW, AUTOTUNE_KERNEL_MARCH=march, AUTOTUNE_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]


@needs_operators
@pytest.mark.slow
@pytest.mark.fault("D64")
def test_two_processes_and_a_damaged_library(tmp_path) -> None:
    code = "from autotune.runtime import kernels; assert kernels.available() is None, kernels.available()"
    plain = tmp_path / "plain"  # what the code does is not the question, and -O3 takes minutes
    plain.write_text(
        '#!/bin/sh\nfor word; do shift; [ "$word" = -O3 ] && word=-O0; set -- "$@" "$word"; done\nexec c++ "$@"\n'
    )
    plain.chmod(0o755)
    folder = tmp_path / "cache"
    folder.mkdir(0o700)
    changed = {"AUTOTUNE_CACHE_DIR": str(folder), "CXX": str(plain)}
    environment = {**os.environ, **changed}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    (library,) = (folder / "kernels").iterdir()
    whole = library.read_bytes()
    library.write_bytes(whole[:1000])
    assert python(code, **changed).returncode == 0
    (library,) = (folder / "kernels").iterdir()
    assert len(library.read_bytes()) == len(whole)


@needs_operators
@pytest.mark.slow
def test_the_process_has_one_openmp_runtime() -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    code = (
        "import torch; from autotune.runtime import kernels as k; assert k.available() is None;"
        "k.Int8Linear.from_weight(torch.randn(4096, 64))(torch.randn(1, 64));"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'omp.' in line or 'omp5.' in line})"
    )
    runtimes = python(code).stdout
    assert runtimes.count(".so") + runtimes.count(".dylib") == 1, runtimes
