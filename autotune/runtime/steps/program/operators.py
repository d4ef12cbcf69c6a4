"""Instructions for the operators that are more than one elementwise instruction: their inputs and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from ....errors import TransformError
from ...kernels.pack import BITS
from .building import Building, ref
from .instruction import FORMATS, NOWHERE, TYPES, Place, Ref, Share, dense

aten = torch.ops.aten

POWERS = {2: "square", 3: "cube", 0.5: "root", -0.5: "inverse_root", -1: "reciprocal"}
WIDENINGS = {torch.float16: "widen_half", torch.bfloat16: "widen_bf16"}
WRITTEN = "a program writes keys and values in FP32 or FP16"
COPIES = {torch.float32: "copy", torch.int64: "copy_int", torch.bool: "copy_bool"}


def token_ids(build: Building, given: Any) -> Place:
    ids = build.place(given)
    return ids if ids.contiguous else build.elementwise("copy_int", build.new(ids.shape, torch.int64), ids)


def power(build: Building, out: torch.Tensor, base: Any, exponent: Any) -> Place:
    if exponent not in POWERS:
        raise TransformError(f"a program has no instruction for powers of {exponent}")
    return build.like(POWERS[exponent], out, build.floats(base))


def gelu(build: Building, out: torch.Tensor, x: Any, approximate: str = "none") -> Place:
    return build.like("gelu_tanh" if approximate == "tanh" else "gelu", out, build.floats(x))


def mean(build: Building, out: torch.Tensor, given: Any, dims: Any, keepdim: bool = False) -> Place:
    x = build.floats(given)
    if [d % len(x.shape) for d in dims] != [len(x.shape) - 1]:
        raise TransformError("a program has no instruction for means over other dimensions than the last")
    means = build.new(out.shape)
    repeated = replace(means, shape=x.shape, strides=(*dense(x.shape[:-1]), 0))
    words, share = build.space((repeated, x), pinned=True)
    build.emit("mean", share, words, [x], means)
    return means


def normalize(
    build: Building, out: Any, given: Any, shape: Any, weight: Any, bias: Any, eps: float
) -> tuple[Place, None, None]:
    x = build.dense(given)
    if len(shape) != 1:
        raise TransformError("a program has no instruction for layer norms over several dimensions")
    factors = [None if p is None else build.dense(p) for p in (weight, bias)]
    normal = build.new(x.shape)
    words, share = build.space((normal, x), pinned=True)
    reads = [x, *filter(None, factors)]
    build.emit("normalize", share, [*words, *map(ref, factors), float(eps)], reads, normal)
    return normal, None, None  # only gradients need mean and deviation


def embedding(build: Building, out: torch.Tensor, weight: Any, given: Any, *_: Any) -> Place:
    table, ids = build.place(weight), token_ids(build, given)
    if table.dtype not in WIDENINGS or not table.contiguous:
        table = build.dense(table)
    rows = build.new(out.shape, table.dtype)
    share = build.share((ids,))
    words = [ids.size, table.shape[0], table.shape[1] * table.dtype.itemsize, ids.ref, table.ref, rows.ref]
    build.emit("embed", share, words, [ids, table], rows)
    return rows


def concatenate(build: Building, out: torch.Tensor, parts: Any, dim: int = 0) -> Place:
    whole = build.new(out.shape, out.dtype)
    dim, at = dim % len(out.shape), 0
    for part in map(build.place, parts):
        offset = whole.offset + at * whole.strides[dim]
        build.elementwise(COPIES[part.dtype], replace(whole, offset=offset, shape=part.shape), part)
        at += part.shape[dim]
    return whole


def copy(build: Building, out: torch.Tensor, given: Any, **_: Any) -> Place:
    place = build.place(given)
    if place.dtype == torch.int64 and out.dtype == torch.float32:
        return build.like("to_float", out, place)
    if place.dtype in WIDENINGS and out.dtype == torch.float32:
        return build.like(WIDENINGS[place.dtype], out, place)
    if place.dtype == torch.float32 and out.dtype == torch.float16:  # for slots that keep keys and values in FP16
        return build.like("narrow_half", out, place)
    if place.dtype != out.dtype or out.dtype not in COPIES:
        raise TransformError(f"a program has no instruction to turn {place.dtype} into {out.dtype}")
    return build.like(COPIES[out.dtype], out, place)


def index_copy(build: Building, out: torch.Tensor, target: Any, dim: int, index: Any, source: Any) -> Place:
    held, slot, new = build.place(target), build.place(index), build.place(source)
    if not _is_written(held, new) or slot.size != 1:
        raise TransformError(f"{WRITTEN}, one slot at a time")
    return _into_slots(build, held, dim, slot, 0, new)


def scatter(build: Building, out: torch.Tensor, target: Any, dim: int, index: Any, source: Any) -> Place:
    """Write each row into a slot of its own: the index is a slot per row, expanded to the source's shape."""
    held, slots, new = build.place(target), build.place(index), build.place(source)
    d, by_row = dim % len(held.shape), slots.strides[0]
    within = (stride for size, stride in zip(slots.shape[1:], slots.strides[1:], strict=True) if size > 1)
    of_row = slots.shape == new.shape and by_row and not any(within)
    rows = new.shape[0] == build.rows > 1 and new.shape[d] == 1
    if not _is_written(held, new) or not of_row or not rows:
        raise TransformError(f"{WRITTEN}, one slot of each row at a time")
    return _into_slots(build, held, dim, slots, by_row, new)


def _is_written(held: Place, new: Place) -> bool:
    """Whether a program can write `new` into these slots."""
    return held.root.kind == "input" and held.dtype == new.dtype and held.dtype in (torch.float32, torch.float16)


def _into_slots(build: Building, held: Place, dim: int, slots: Place, by_row: int, new: Place) -> Place:
    d = dim % len(held.shape)
    words, share = build.space((replace(held, shape=new.shape), new))
    header = [TYPES[held.dtype], held.shape[d], held.strides[d], slots.ref, by_row]
    build.emit("index_copy", share, [*header, *words], [slots, new], held)
    return held


def packed_rows(
    build: Building, out: torch.Tensor, given: Any, packed: Any, scales: Any, zeros: Any, rows: int, width: int
) -> Place:
    """Look up rows of a packed table."""
    ids, table = token_ids(build, given), build.place(packed)
    factors = [None if f is None else build.place(f) for f in (scales, zeros)]
    form, inputs, block_bytes = packing(table)
    groups = factors[0].shape[1] if factors[0] else 1
    found = build.new(out.shape)
    words = [form, ids.size, rows, inputs, groups, block_bytes, width, ids.ref, found.ref, table.ref]
    reads = [ids, table, *filter(None, factors)]
    build.emit("embed_packed", build.share((ids,)), [*words, *chain(*map(factor, factors))], reads, found)
    return found


def packing(packed: Place) -> tuple[int, int, int]:
    """The number of the format, the inputs and the bytes of a block, for weights [blocks, K or words, 16]."""
    _, length, lanes = packed.shape
    block_bytes = length * lanes * packed.dtype.itemsize
    return FORMATS.index(packed.dtype), block_bytes * 8 // (BITS[packed.dtype] * lanes), block_bytes


def factor(place: Place | None) -> tuple[Ref, int]:
    """The address of scales or zeros, which may be absent, and the number of their dtype."""
    return ref(place), TYPES[torch.float32 if place is None else place.dtype]


def linear(build: Building, out: torch.Tensor, x: Any, weight: Any, *more: Any) -> Place:
    """A product with a packed layer of `kernels` in FP32."""
    *factors, bias, rows = more
    return _product(build, out, x, weight, factors, bias, rows, 0)


def linear_in_integers(build: Building, out: torch.Tensor, x: Any, weight: Any, *more: Any) -> Place:
    """The same in integers where the processor can; the last operand, the digits of the inputs, may be absent."""
    many = 2 if build.place(weight).dtype == torch.int32 else 1  # scales and zeros, or scales alone
    factors, (bias, rows, *rest) = more[:many], more[many:]
    return _product(build, out, x, weight, factors, bias, rows, rest[0] if rest else 2)


def _product(
    build: Building, out: torch.Tensor, x: Any, weight: Any, factors: Sequence[Any], bias: Any, rows: int, digits: int
) -> Place:
    given = build.dense(x)
    packed = build.place(weight)
    scales, zeros = ([build.place(f) for f in factors] + [None, None])[:2]
    form, padded, block_bytes = packing(packed)
    group = padded // (scales.shape[1] if scales else 1)
    inputs = given.shape[-1]
    tokens = given.size // inputs
    shift = None if bias is None else build.dense(bias)
    y = build.new(out.shape)
    weights = (rows, padded, group)
    sums = None
    if digits and torch.ops.autotune.least_digits(BITS[packed.dtype]):
        code, arranged = "linear_rounded", build.round(given, weights, digits)
        words = [form, *weights, block_bytes, digits, inputs, tokens, arranged.ref]
    else:
        arranged, sums = build.arrange(given, weights, inputs, tokens, zeros is not None)
        code, words = "linear", [form, *weights, block_bytes, tokens, arranged.ref, ref(sums)]
    words += [ref(shift), y.ref, packed.ref, *factor(scales), *factor(zeros)]
    reads = [p for p in (arranged, sums, shift, packed, scales, zeros) if p is not None]
    build.emit(code, Share.TEAM, words, reads, y, matrix=(inputs, rows))
    return y


def product(build: Building, out: torch.Tensor, *args: Any) -> Place:
    """mm(x, W^T) and addmm(bias, x, W^T) with W [N, K] in torch's layout."""
    *bias, x, transposed = args
    given, weight = build.dense(x), build.floats(transposed)
    if weight.root.kind != "constant" or weight.strides != (1, weight.shape[0]):
        raise TransformError("a program multiplies by weights only, one row after the other")
    shift = build.dense(bias[0]) if bias else None
    inputs, rows = weight.shape
    y = build.new(out.shape)
    words = [rows, inputs, given.size // inputs, given.ref, ref(shift), y.ref, weight.ref]
    reads = [p for p in (given, shift, weight) if p is not None]
    build.emit("dot", Share.TEAM, words, reads, y, matrix=(inputs, rows))
    return y


def attend(
    build: Building, out: torch.Tensor, query: Any, keys: Any, values: Any, length: Any, mask: Any, scale: float
) -> Place:
    """Attention of one query over the slots."""
    if length is not None:
        raise TransformError("a program takes the length from the mask")
    q, k, v = build.dense(query), build.place(keys), build.place(values)
    admitted = None if mask is None else build.place(mask)
    batch, heads, _, depth = q.shape
    if k.dtype not in TYPES or k.strides[3] != 1 or v.strides[3] != 1 or v.dtype != k.dtype:
        raise TransformError("a program attends to floating-point keys and values, contiguous in their last dimension")
    y = build.new(out.shape)
    words: list[Any] = [batch, k.shape[1], heads, depth, k.shape[2], float(scale), TYPES[k.dtype], q.ref]
    words += chain.from_iterable((p.ref, *p.strides[:3]) for p in (k, v))
    if admitted is None:
        words += [NOWHERE, 0, 0, 0]
    else:
        if admitted.dtype not in (torch.bool, torch.float32) or (admitted.strides[3] != 1 and admitted.shape[3] > 1):
            raise TransformError("a program takes masks that are boolean or FP32, contiguous in their slots")
        steps = (0 if size == 1 else stride for size, stride in zip(admitted.shape, admitted.strides, strict=True))
        words += [admitted.ref, int(admitted.dtype == torch.float32), *list(steps)[:2]]
    reads = [p for p in (q, k, v, admitted) if p is not None]
    build.emit("attend", Share.TEAM, [*words, y.ref], reads, y)
    return y


def outer(build: Building, out: torch.Tensor, a: Any, b: Any) -> Place:
    """Products of matrices [B, N, K] and [B, K, M] with K = 1. Rotary embeddings use them up to transformers 5.19."""
    x, y = build.floats(a), build.floats(b)
    if x.shape[2] != 1:
        raise TransformError(f"a program has no instruction for a batch of products over {x.shape[2]} numbers")
    return build.like("multiply", out, x, y)


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.pow: power,
    aten.gelu: gelu,
    aten.mean: mean,
    aten.native_layer_norm: normalize,
    aten.embedding: embedding,
    aten.cat: concatenate,
    aten._to_copy: copy,
    aten.clone: copy,
    aten.index_copy_: index_copy,
    aten.scatter_: scatter,
    aten.mm: product,
    aten.addmm: product,
    aten.bmm: outer,
}
KERNELS: dict[str, Callable[..., Any]] = {  # autotune's operators, which exist only once loaded
    "autotune.linear_f16": linear,
    "autotune.linear_i8": linear_in_integers,
    "autotune.linear_i6": linear_in_integers,
    "autotune.linear_i4": linear_in_integers,
    "autotune.packed_rows": packed_rows,
    "autotune.attend_one": attend,
}
