"""Operators raise on tensors that they cannot read, before any memory is touched; a crash would end the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autotune.runtime import kernels

pytestmark = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def half(*shape: int) -> torch.Tensor:
    return ones(*shape, dtype=torch.float16)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return ones(*shape, dtype=dtype)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """The same sizes over no memory."""
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """The same sizes over one element too few."""
    tensor.untyped_storage().resize_(tensor.nbytes - tensor.itemsize)
    return tensor


def int8(*shape: int) -> torch.Tensor:
    return ints(*shape, dtype=torch.int8)


def words(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


GONE = "beyond its memory"


def heads(**changes: Any) -> tuple[Any, ...]:
    """Arguments of a layer's operator before attention: two heads of 32 numbers."""
    weight = [int8(4, 64, 16), half(4, 2, 16)]
    given = {"x": ones(1, 40, 64), "norm": ones(64), "eps": 1e-6, "q": weight, "k": weight, "v": weight}
    given |= dict.fromkeys(("q_bias", "k_bias", "v_bias", "q_norm", "k_norm")) | {"head_eps": 0.0}
    given |= {"outputs": 64, "key_outputs": 64, "cosines": ones(1, 40, 32), "sines": ones(1, 40, 32), "digits": 2}
    return tuple((given | changes).values())


def layer_end(**changes: Any) -> tuple[Any, ...]:
    """Arguments of a layer's operator after attention."""
    weight = [int8(4, 64, 16), half(4, 2, 16)]
    given = {"x": ones(1, 40, 64), "attended": ones(1, 40, 2, 32), "o": weight, "o_bias": None, "norm": ones(64)}
    given |= {"eps": 1e-6, "gate": weight, "up": weight, "down": weight}
    given |= dict.fromkeys(("gate_bias", "up_bias", "down_bias")) | {"hidden": 64, "activation": 0, "digits": 2}
    return tuple((given | changes).values())


CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]], str]] = {
    "f16: weights of integers": ("linear_f16", lambda: (ones(3, 64), ints(1, 64, 16), None, 16), "FP16, BF16 or FP32"),
    "f16: a matrix": ("linear_f16", lambda: (ones(3, 64), half(16, 64), None, 16), "packed weights"),
    "f16: strided": ("linear_f16", lambda: (ones(3, 64), half(1, 64, 32)[..., ::2], None, 16), "must be contiguous"),
    "f16: freed": ("linear_f16", lambda: (ones(3, 64), freed(half(1, 64, 16)), None, 16), GONE),
    "f16: cut": ("linear_f16", lambda: (ones(3, 64), cut(half(1, 64, 16)), None, 16), GONE),
    "f16: x is freed": ("linear_f16", lambda: (freed(ones(3, 64)), half(1, 64, 16), None, 16), GONE),
    "f16: half of x is freed": ("linear_f16", lambda: (freed(half(3, 64)), half(1, 64, 16), None, 16), GONE),
    "f16: bias is freed": ("linear_f16", lambda: (ones(3, 64), half(1, 64, 16), freed(ones(16)), 16), GONE),
    "f16: bias of 15": ("linear_f16", lambda: (ones(3, 64), half(1, 64, 16), ones(15), 16), "the bias has 15"),
    "f16: no inputs": ("linear_f16", lambda: (ones(3, 0), half(1, 0, 16), None, 16), "multiple of 8"),
    "f16: no outputs": ("linear_f16", lambda: (ones(3, 64), half(0, 64, 16), None, -5), "one output or more"),
    "i8: FP16": ("linear_i8", lambda: (ones(3, 64), half(1, 64, 16), half(1, 2, 16), None, 16), "INT8"),
    "i8: scales": ("linear_i8", lambda: (ones(3, 64), int8(1, 64, 16), ints(1, 2, 16), None, 16), "FP32, FP16 or BF16"),
    "i8: groups": (
        "linear_i8",
        lambda: (ones(3, 64), int8(1, 64, 16), half(1, 3, 16), None, 16),
        "groups of a multiple",
    ),
    "i8: cut": ("linear_i8", lambda: (ones(3, 64), int8(1, 64, 16), cut(half(1, 2, 16)), None, 16), GONE),
    "i6: bytes": ("linear_i6", lambda: (ones(3, 64), int8(1, 24, 16), half(1, 2, 16), None, 16), "in each three INT16"),
    "i6: not whole": (
        "linear_i6",
        lambda: (ones(3, 64), ints(1, 25, 16, dtype=torch.int16), half(1, 2, 16), None, 16),
        "multiple of 8",
    ),
    "i6: cut": (
        "linear_i6",
        lambda: (ones(3, 64), cut(ints(1, 24, 16, dtype=torch.int16)), half(1, 2, 16), None, 16),
        GONE,
    ),
    "i4: bytes": (
        "linear_i4",
        lambda: (ones(3, 64), int8(1, 8, 16), half(1, 2, 16), half(1, 2, 16), None, 16),
        "eight weights in each INT32",
    ),
    "i4: zeros": (
        "linear_i4",
        lambda: (ones(3, 64), ints(1, 8, 16), half(1, 1, 16), half(1, 2, 16), None, 16),
        "as many zeros",
    ),
    "bf16: FP16": ("linear_bf16", lambda: (ones(40, 64), half(16, 64), None, None, None, 16, 1), "must be FP32"),
    "bf16: freed": ("linear_bf16", lambda: (ones(40, 64), freed(ones(16, 64)), None, None, None, 16, 1), GONE),
    "bf16: no outputs": (
        "linear_bf16",
        lambda: (ones(40, 64), ones(0, 64), None, None, None, 0, 1),
        "with inputs and",
    ),
    "bf16: zeros": (
        "linear_bf16",
        lambda: (ones(40, 64), ints(1, 8, 16), half(1, 1, 16), half(1, 4, 16), None, 16, 1),
        "as many zeros",
    ),
    "mlp: nothing hidden": (
        "linear_mlp",
        lambda: (ones(40, 64), [ones(0, 64)], [ones(0, 64)], [ones(64, 0)], None, None, None, 0, 64, 0, 1),
        "with inputs and outputs",
    ),
    "mlp: no weight": (
        "linear_mlp",
        lambda: (ones(40, 64), [], [ones(32, 64)], [ones(64, 32)], None, None, None, 32, 64, 0, 1),
        "a weight is its numbers",
    ),
    "mlp: another width": (
        "linear_mlp",
        lambda: (ones(40, 64), [ones(32, 64)], [ones(31, 64)], [ones(64, 32)], None, None, None, 32, 64, 0, 1),
        "must be FP32",
    ),
    "rounded mlp: plain weights": (
        "linear_mlp_rounded",
        lambda: (ones(40, 64), [ones(32, 64)], [ones(32, 64)], [ones(64, 32)], None, None, None, 32, 64, 0, 2),
        "INT8, INT6 and INT4 weights|no instructions",
    ),
    "rounded mlp: in FP32": (
        "linear_mlp_rounded",
        lambda: (ones(40, 64), *[[int8(4, 64, 16), half(4, 2, 16)]] * 3, None, None, None, 64, 64, 0, 0),
        "no instructions",
    ),
    "rounded mlp: no scales": (
        "linear_mlp_rounded",
        lambda: (ones(40, 64), *[[int8(4, 64, 16)]] * 3, None, None, None, 64, 64, 0, 2),
        "need scales|no instructions",
    ),
    "rounded mlp: no zeros": (
        "linear_mlp_rounded",
        lambda: (ones(40, 64), *[[ints(4, 8, 16), half(4, 2, 16)]] * 3, None, None, None, 64, 64, 0, 2),
        "need scales|no instructions",
    ),
    "rounded mlp: groups": (
        "linear_mlp_rounded",
        lambda: (
            ones(40, 64),
            [int8(4, 64, 16), half(4, 2, 16)],
            [int8(4, 64, 16), half(4, 8, 16)],
            [int8(4, 64, 16), half(4, 2, 16)],
            *(None, None, None, 64, 64, 0, 2),
        ),
        "round their inputs alike|no instructions",
    ),
    "heads: FP16": ("layer_heads_rounded", lambda: heads(x=half(1, 40, 64)), "FP32 numbers of one token or more"),
    "heads: no tokens": ("layer_heads_rounded", lambda: heads(x=ones(1, 0, 64)), "FP32 numbers of one token or more"),
    "heads: norm": ("layer_heads_rounded", lambda: heads(norm=ones(63)), "63 weights for 64 numbers"),
    "heads: norm is freed": ("layer_heads_rounded", lambda: heads(norm=freed(ones(64))), GONE),
    "heads: angles": ("layer_heads_rounded", lambda: heads(cosines=ones(1, 39, 32)), "cosines and sines must be"),
    "heads: sines": ("layer_heads_rounded", lambda: heads(sines=ones(1, 40, 16)), "cosines and sines must be"),
    "heads: odd depth": (
        "layer_heads_rounded",
        lambda: heads(cosines=ones(1, 40, 1), sines=ones(1, 40, 1)),
        "D even and a divisor",
    ),
    "heads: plain weights": (
        "layer_heads_rounded",
        lambda: heads(q=[ones(64, 64)]),
        "INT8, INT6 and INT4 weights|no instructions",
    ),
    "heads: groups": (
        "layer_heads_rounded",
        lambda: heads(k=[int8(4, 64, 16), half(4, 8, 16)]),
        "queries, keys and values|no instructions",
    ),
    "heads: no weight": ("layer_heads_rounded", lambda: heads(v=[]), "a weight is its numbers"),
    "heads: rounded weights in FP32": ("layer_heads_floats", lambda: heads(), "packed weights in FP16, BF16 or FP32"),
    "end: rounded weights in FP32": ("layer_end_floats", lambda: layer_end(), "packed weights in FP16, BF16 or FP32"),
    "end: activation in FP32": ("layer_end_floats", lambda: layer_end(activation=2), "activation is 0"),
    "end: another sequence": (
        "layer_end_rounded",
        lambda: layer_end(attended=ones(1, 39, 2, 32)),
        r"attention must be \[B, S, H, D\]",
    ),
    "end: width": ("layer_end_rounded", lambda: layer_end(attended=ones(1, 40, 3, 32)), "does not have the number of"),
    "end: activation": ("layer_end_rounded", lambda: layer_end(activation=2), "activation is 0"),
    "end: bias": ("layer_end_rounded", lambda: layer_end(down_bias=ones(63)), "63 numbers for 64 outputs"),
    "i8: digits": ("linear_i8", lambda: (ones(3, 64), int8(1, 64, 16), half(1, 2, 16), None, 16, 3), "digits is 0"),
    "rms_norm: width": ("rms_norm", lambda: (ones(3, 64), ones(63), 1e-6), "one number for each"),
    "rms_norm: freed": ("rms_norm", lambda: (ones(3, 64), freed(ones(64)), 1e-6), GONE),
    "gate_up: shapes": ("gate_up", lambda: (ones(3, 64), ones(3, 63), 0), "one shape"),
    "gate_up: freed": ("gate_up", lambda: (ones(3, 64), freed(half(3, 64)), 0), GONE),
    "rotary: FP16": ("rotary", lambda: (half(1, 2, 3, 8), ones(1, 2, 3, 8), *[ones(1, 3, 8)] * 2), "expected FP32"),
    "rotary: strided": (
        "rotary",
        lambda: (ones(1, 2, 8, 3).transpose(2, 3), ones(1, 2, 3, 8), *[ones(1, 3, 8)] * 2),
        "contiguous",
    ),
    "rotary: freed": ("rotary", lambda: (ones(1, 2, 3, 8), freed(ones(1, 2, 3, 8)), *[ones(1, 3, 8)] * 2), GONE),
    "rotary: angles": ("rotary", lambda: (*[ones(1, 2, 3, 8)] * 2, ones(1, 2, 8), ones(1, 2, 8)), "cosines and sines"),
    "one: integers": ("attend_one", lambda: (ones(1, 2, 1, 8), *[ints(1, 2, 5, 8)] * 2, None, None, 1.0), "FP32, FP16"),
    "one: freed": ("attend_one", lambda: (ones(1, 2, 1, 8), *[freed(ones(1, 2, 5, 8))] * 2, None, None, 1.0), GONE),
    "one: no depth": ("attend_one", lambda: (ones(1, 2, 1, 0), *[ones(1, 2, 5, 0)] * 2, None, None, 1.0), "numbers in"),
    "one: no heads": ("attend_one", lambda: (ones(1, 0, 1, 8), *[ones(1, 2, 5, 8)] * 2, None, None, 1.0), "must have"),
    "one: strided": (
        "attend_one",
        lambda: (ones(1, 2, 1, 8), *[ones(1, 2, 8, 5).transpose(2, 3)] * 2, None, None, 1.0),
        "contiguous in their last",
    ),
    "one: mask is freed": (
        "attend_one",
        lambda: (ones(1, 2, 1, 8), *[ones(1, 2, 5, 8)] * 2, None, freed(ones(1, 1, 1, 5)), 1.0),
        GONE,
    ),
    "many: spans": ("attend_many", lambda: (*[ones(1, 2, 5, 8)] * 3, words(0, 1)[None, None], 1.0, 0), "spans must be"),
    "many: freed": ("attend_many", lambda: (*[ones(1, 2, 5, 8)] * 2, freed(ones(1, 2, 5, 8)), None, 1.0, 0), GONE),
    "mask_spans: FP32": ("mask_spans", lambda: (ones(1, 1, 3, 3),), "boolean"),
    "mask_spans: freed": ("mask_spans", lambda: (freed(ones(1, 1, 3, 3, dtype=torch.bool)),), GONE),
    "rows: ids in FP32": ("packed_rows", lambda: (ones(3), half(1, 8, 16), None, None, 16, 8), "INT64 or INT32"),
    "rows: FP64": (
        "packed_rows",
        lambda: (words(1), ones(1, 8, 16, dtype=torch.float64), None, None, 16, 8),
        "packed_rows takes tables",
    ),
    "rows: groups of 12": (
        "packed_rows",
        lambda: (words(0), int8(1, 24, 16), ones(1, 2, 16), None, 16, 24),
        "multiples of 8",
    ),
    "rows: outside": ("packed_rows", lambda: (words(16), half(1, 8, 16), None, None, 16, 8), "out of range"),
    "rows: freed": ("packed_rows", lambda: (words(1), freed(half(1, 8, 16)), None, None, 16, 8), GONE),
    "rows: no columns": ("packed_rows", lambda: (words(1), half(1, 8, 16), None, None, 16, 0), "rows and columns"),
    "program: no words": ("run_program", lambda: (words(), words(0), 1, None), "begins with"),
    "program: FP32": ("run_program", lambda: (ones(4), words(0), 1, None), "INT64 words"),
    "program: addresses": ("run_program", lambda: (words(2), words(0), 1, None), "needs 2 addresses, and was given 1"),
    "program: no length": (
        "run_program",
        lambda: (words(1, 0, 0, 0, 0), words(0), 1, None),
        "instruction 0 .* damaged",
    ),
    "program: too long": ("run_program", lambda: (words(1, 9, 0, 0, 0), words(0), 1, None), "instruction 0 .* damaged"),
    "program: no such code": ("run_program", lambda: (words(1, 4, 99, 0, 0), words(0), 1, None), "damaged"),
    "program: freed": ("run_program", lambda: (freed(words(1, 4, 0, 0, 0)), words(0), 1, None), GONE),
    "program: times": ("run_program", lambda: (words(1), words(0), 1, words(1, 2)), "one for each instruction"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_read_is_refused(case: str) -> None:
    operator, arguments, says = CASES[case]
    with pytest.raises(RuntimeError, match=says):
        getattr(torch.ops.autotune, operator)(*arguments())


def test_a_view_that_fills_its_memory_is_read() -> None:
    """The last element counts, and none after it."""
    whole = ones(2, 3, 64)
    last = whole[1, 1:]
    y = torch.ops.autotune.rms_norm(last, whole[0, 0], 0.0)
    torch.testing.assert_close(y, ones(2, 64))
