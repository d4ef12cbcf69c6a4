"""The fake device refuses operators as a GPU's kernels do, by dtype, mask, shape and compute capability."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.errors import TransformError
from autotune.machine.device import Identity
from autotune.runtime.steps.waiting import require_no_wait
from autotune.transforms import torchao
from autotune.transforms.bitsandbytes import library
from tests.fakes.cuda import FakeCuda
from tests.fakes.refusals import REFUSALS, WAITS, waits
from tests.fakes.rules import Misuse

aten = torch.ops.aten
META: dict[str, Any] = {"device": "meta"}  # a CPU lacks most of these operators; their shapes are known everywhere
INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
HALF, FULL = torch.bfloat16, torch.float32


def heads(
    dtype: torch.dtype = HALF,
    size: int = 64,
    queries: int = 1,
    keys: int = 24,
    key_heads: int = 4,
    pad: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q, k, v and a mask whose rows begin at multiples of `pad` numbers; no mask without it."""
    q = torch.empty(1, 4, queries, size, dtype=dtype, **META)
    k = torch.empty(1, key_heads, keys, size, dtype=dtype, **META)
    row = None if pad is None else -(-keys // pad) * pad
    mask = None if row is None else torch.empty(1, 4, 2, row, dtype=dtype, **META)[:, :, :queries, :keys]
    return q, k, k, mask


def sdpa(backend: SDPBackend, **given: Any) -> None:
    q, k, v, mask = heads(**given)
    with sdpa_kernel(backend):
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flash(**given: Any) -> None:
    aten._scaled_dot_product_flash_attention(*heads(**given)[:3], 0.0, False, False)


def varlen(
    dtype: torch.dtype = HALF, size: int = 64, key_heads: int = 2, lengths: torch.dtype = torch.int32, step: int = 1
) -> None:
    q, k = torch.empty(2, 4, size, dtype=dtype, **META), torch.empty(48, key_heads, size, dtype=dtype, **META)
    order, begin, seen = (torch.empty(count * step, dtype=lengths, **META)[::step] for count in (3, 3, 2))
    aten._flash_attention_forward(q, k, k, order, begin, 1, 24, 0.0, False, False, seqused_k=seen)


def efficient(**given: Any) -> None:
    aten._scaled_dot_product_efficient_attention(*heads(**given), False)


def cudnn(**given: Any) -> None:
    aten._scaled_dot_product_cudnn_attention(*heads(**given), False)


def flex(size: int) -> None:
    q = torch.ones(1, 1, 2, size)
    with torch.compiler.set_stance("force_eager"):
        flex_attention(q, q, q)


def int_mm(rows: int = 17, inputs: int = 32, outputs: int = 16) -> None:
    torch._int_mm(torch.empty(rows, inputs, dtype=INT8, **META), torch.empty(inputs, outputs, dtype=INT8, **META))


def scaled_mm(
    rows: int = 1, inputs: int = 32, outputs: int = 16, dtypes: tuple[Any, Any] = (E4M3, E4M3), row_major: bool = False
) -> None:
    a, b = torch.ones(rows, inputs).to(dtypes[0]), torch.ones(outputs, inputs).to(dtypes[1]).t()
    one = torch.ones(())
    torch._scaled_mm(a, b.contiguous() if row_major else b, scale_a=one, scale_b=one, out_dtype=HALF)


def int4(dtype: torch.dtype = HALF, inputs: int = 128, group: int = 32) -> None:
    with FakeTensorMode():
        packed = torch.empty(2, inputs // 128, 32, 4, dtype=torch.int32, device="cuda")
        x, scales = torch.empty(1, inputs, dtype=dtype, device="cuda"), torch.empty(4, 16, 2, device="cuda")
        aten._weight_int4pack_mm(x, packed, group, scales)


def bnb_int8(dtype: torch.dtype) -> None:
    library().functional.int8_vectorwise_quant(torch.ones(2, 8, dtype=dtype))


ONLY_FLASH, ONLY_CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
ONLY_EFFICIENT = SDPBackend.EFFICIENT_ATTENTION
NO_KERNEL = "No available kernel"
MISALIGNED = "attn_bias is not correctly aligned"

CALLS: list[tuple[str, Callable[..., None], dict[str, Any], str, str | None]] = [  # rule, work, capability, refusal
    ("sdpa", partial(sdpa, ONLY_FLASH), {}, "9.0", None),
    ("sdpa", partial(sdpa, ONLY_FLASH), {"pad": 8}, "9.0", NO_KERNEL),
    ("sdpa", partial(sdpa, ONLY_FLASH), {"dtype": FULL}, "9.0", NO_KERNEL),
    ("sdpa", partial(sdpa, ONLY_FLASH), {"size": 512}, "9.0", NO_KERNEL),
    ("sdpa", partial(sdpa, ONLY_FLASH), {}, "7.5", NO_KERNEL),
    ("sdpa", partial(sdpa, ONLY_CUDNN), {"pad": 8}, "9.0", None),
    ("sdpa", partial(sdpa, ONLY_CUDNN), {"dtype": FULL}, "9.0", NO_KERNEL),
    ("sdpa", partial(sdpa, ONLY_CUDNN), {"size": 136}, "9.0", NO_KERNEL),
    ("sdpa", partial(sdpa, ONLY_CUDNN), {"keys": 1}, "9.0", NO_KERNEL),
    ("sdpa", partial(sdpa, ONLY_EFFICIENT), {"dtype": FULL, "pad": 1, "keys": 23}, "7.5", None),
    ("sdpa", partial(sdpa, ONLY_EFFICIENT), {"size": 60}, "9.0", NO_KERNEL),
    ("sdpa", partial(sdpa, SDPBackend.MATH), {"dtype": FULL, "size": 60}, "7.5", None),
    ("flash", flash, {"key_heads": 2}, "9.0", None),
    ("flash", flash, {"key_heads": 3}, "9.0", "must divide number of heads in query"),
    ("flash", flash, {"size": 60}, "9.0", "must be a multiple of 8"),
    ("flash", flash, {"dtype": FULL}, "9.0", "only support fp16 and bf16"),
    ("varlen", varlen, {}, "8.0", None),
    ("varlen", varlen, {}, "7.5", "Ampere GPUs or newer"),
    ("varlen", varlen, {"dtype": FULL}, "9.0", "only support fp16 and bf16"),
    ("varlen", varlen, {"size": 264}, "9.0", "at most 256"),
    ("varlen", varlen, {"size": 60}, "9.0", "must be a multiple of 8"),
    ("varlen", varlen, {"key_heads": 3}, "9.0", "must divide number of heads in query"),
    ("varlen", varlen, {"lengths": torch.int64}, "9.0", "must have dtype int32"),
    ("varlen", varlen, {"step": 2}, "9.0", "must be contiguous"),
    ("efficient", efficient, {"pad": 8, "queries": 2, "keys": 23}, "9.0", None),
    ("efficient", efficient, {"pad": 4, "queries": 2, "keys": 23, "dtype": FULL}, "9.0", None),
    ("efficient", efficient, {"pad": 1, "queries": 2, "keys": 23}, "9.0", MISALIGNED),
    ("efficient", efficient, {"pad": 1, "queries": 1, "keys": 23}, "9.0", MISALIGNED),  # the heads' stride
    ("efficient", efficient, {"key_heads": 2}, "9.0", "query.size"),
    ("efficient", efficient, {"size": 60}, "9.0", "query is not correctly aligned"),
    ("efficient", efficient, {}, "7.5", "Half, Float"),
    ("cudnn", cudnn, {"pad": 1, "keys": 23, "key_heads": 2}, "8.0", None),
    ("cudnn", cudnn, {"size": 60}, "9.0", "multiple of 8"),
    ("cudnn", cudnn, {"size": 136}, "9.0", "no more than 128"),
    ("cudnn", cudnn, {"keys": 1}, "9.0", "sequence length 1"),
    ("flex", flex, {"size": 16}, "9.0", None),
    ("flex", flex, {"size": 8}, "9.0", "at least 16"),
    ("int_mm", int_mm, {}, "8.0", None),
    ("int_mm", int_mm, {"rows": 16}, "8.0", "needs to be greater than 16, but got 16"),
    ("int_mm", int_mm, {"inputs": 36}, "8.0", "multiple of 8, but got 36"),
    ("int_mm", int_mm, {"outputs": 12}, "8.0", "multiple of 8, but got 12"),
    ("scaled_mm", scaled_mm, {}, "8.9", None),
    ("scaled_mm", scaled_mm, {}, "8.6", "only supported on CUDA devices"),
    ("scaled_mm", scaled_mm, {"inputs": 24}, "9.0", "divisible by 16"),
    ("scaled_mm", scaled_mm, {"outputs": 24}, "9.0", "divisible by 16"),
    ("scaled_mm", scaled_mm, {"row_major": True}, "9.0", "col_major"),
    ("scaled_mm", scaled_mm, {"dtypes": (E5M2, E5M2)}, "9.0", "two Float8_e5m2"),
    ("int4", int4, {}, "8.0", None),
    ("int4", int4, {}, "7.5", "not available"),
    ("int4", int4, {"dtype": torch.float16}, "9.0", "kBFloat16"),
    ("int4", int4, {"group": 48}, "9.0", "qGroupSize"),
    ("bnb_int8", bnb_int8, {"dtype": torch.float16}, "9.0", None),
    ("bnb_int8", bnb_int8, {"dtype": HALF}, "9.0", "A must be float16"),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:.*(kernel|attention).*")
@pytest.mark.parametrize(("rule", "work", "given", "capability", "says"), CALLS)
def test_a_kernel_takes_or_refuses(
    rule: str, work: Callable[..., None], given: dict[str, Any], capability: str, says: str | None
) -> None:
    gpu = Identity("a GPU", capability, 2**34)
    with FakeCuda(gpu).kernels(), pytest.raises(RuntimeError, match=says) if says else nullcontext():
        work(**given)
    with FakeCuda(gpu, without={rule}).kernels():  # nothing else refuses it
        work(**given)


@pytest.mark.parametrize("rows", [16, 17])
def test_operators_of_quantised_weights_are_refused(rows: int) -> None:
    """torchao calls them below its own tensors."""
    weight = torchao.quantized(torch.ones(16, 32), "int8_dynamic")
    with FakeCuda().kernels(), pytest.raises(RuntimeError, match="greater than 16") if rows == 16 else nullcontext():
        F.linear(torch.ones(rows, 32), weight)


def test_every_refusal_is_tested_with_what_is_taken() -> None:
    for wanted in (True, False):
        assert {rule for rule, *_, says in CALLS if (says is None) is wanted} == set(REFUSALS)


X, MASK = torch.ones(2, 2), torch.tensor([[True, False], [True, True]])
REPEATS = torch.tensor([1, 2])
WAITING: list[tuple[Callable[[], object], bool]] = [  # work, whether the host waits for it
    (lambda: X.sum().item(), True),
    (lambda: X.nonzero(), True),
    (lambda: torch.where(MASK), True),
    (lambda: torch.equal(X, X), True),
    (lambda: torch.allclose(X, X), True),
    (lambda: X.masked_select(MASK), True),
    (lambda: X[MASK], True),
    (lambda: X.clone().index_put_((MASK,), torch.ones(3)), True),
    (lambda: X.index_put((MASK,), torch.ones(3)), True),
    (lambda: X.clone().__setitem__(MASK, 0.0), False),
    (lambda: X.masked_fill(MASK, 0.0), False),
    (lambda: torch.where(MASK, X, 0.0), False),
    (lambda: X[REPEATS - 1], False),
    (lambda: X.repeat_interleave(REPEATS, 0), True),
    (lambda: X.repeat_interleave(REPEATS, 0, output_size=3), False),
    (lambda: X.repeat_interleave(2, 0), False),
    (lambda: torch.unique(X), True),
    (lambda: torch.unique(X, dim=0), True),
    (lambda: torch.unique_consecutive(X), True),
    (lambda: torch.bincount(REPEATS), True),
    (lambda: torch.multinomial(X, 1), True),
    (lambda: torch.linalg.inv(torch.eye(2)), True),
    (lambda: library().functional.int8_vectorwise_quant(X.half(), threshold=6.0), True),
    (lambda: library().functional.int8_vectorwise_quant(X.half()), False),
]


@pytest.mark.parametrize(("work", "waiting"), WAITING)
def test_a_capture_refuses_what_waits(work: Callable[[], object], waiting: bool) -> None:
    """And the look at a step's operators before a capture finds it."""
    fake = FakeCuda()

    def step() -> torch.Tensor:  # the warm-ups may wait
        work()
        return X * 2

    refused = pytest.raises(Misuse, match="waits for the device while a graph is captured")
    with refused if waiting else nullcontext():
        fake.owner.run(lambda: fake.capture(step))
    found = pytest.raises(TransformError, match="waits for the device")
    with found if waiting else nullcontext():
        require_no_wait(work)


def test_every_operator_that_waits_is_tested() -> None:
    """Operators that consist of others show those."""
    seen = _Names()
    with seen:
        for work, _ in WAITING:
            work()
    assert set(WAITS) - seen.names <= {"aten::item", "aten::is_nonzero"}


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args, kwargs or {}):
            self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))
