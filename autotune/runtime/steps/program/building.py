"""The instructions and the memory of a program under construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ....errors import TransformError
from .instruction import ELEMENTS, FLOAT, MOST_DIMS, NOWHERE, SPANS, Instruction, Place, Ref, Root, Share, dense


class Building:
    """A program under construction.

    Args:
        rows: values whose first dimension has this size are divided among threads by row.

    Attributes:
        roots: memory that instructions read and write.
        values: the value of each node of the graph: a Place, a constant tensor, or a tuple of them.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.roots: list[Root] = []
        self.instructions: list[Instruction] = []
        self.values: dict[torch.fx.Node, Any] = {}
        self._constants: dict[int, Root] = {}
        self._arranged: dict[tuple[Any, ...], tuple[Place, Place | None]] = {}
        self._rounded: dict[tuple[Any, ...], Place] = {}

    # Values

    def root(self, kind: Any, size_bytes: int, tensor: torch.Tensor | None = None) -> Root:
        self.roots.append(Root(len(self.roots), kind, size_bytes, tensor))
        return self.roots[-1]

    def new(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, strides: Sequence[int] = ()) -> Place:
        """Add a temporary. It is contiguous unless strides are given."""
        root = self.root("temporary", math.prod(shape) * dtype.itemsize)
        return Place(root, 0, tuple(shape), tuple(strides) or dense(shape), dtype)

    def constant(self, tensor: torch.Tensor) -> Place:
        key = tensor.untyped_storage().data_ptr()
        if key not in self._constants:
            whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
            self._constants[key] = self.root("constant", whole.numel(), whole)
        return Place(
            self._constants[key], int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype
        )

    def place(self, argument: Any, dtype: torch.dtype = torch.float32) -> Place:
        """An operator's argument as a value; a number becomes a constant of `dtype`."""
        value = self.values[argument] if isinstance(argument, torch.fx.Node) else argument
        if isinstance(value, bool | int | float):
            value = torch.tensor(value, dtype=dtype, device="cpu")
        return value if isinstance(value, Place) else self.constant(value)

    def floats(self, argument: Any) -> Place:
        """The argument in FP32."""
        place = self.place(argument)
        if place.dtype == torch.int64:
            return self.elementwise("to_float", self.new(place.shape), place)
        if place.dtype != torch.float32:
            raise TransformError(f"the step computes in {place.dtype}; programs compute in FP32")
        return place

    def dense(self, argument: Any) -> Place:
        """The argument in FP32 and contiguous."""
        place = self.floats(argument)
        return place if place.contiguous else self.elementwise("copy", self.new(place.shape), place)

    # Instructions

    def emit(
        self,
        code: str,
        share: Share,
        words: Sequence[Any],
        reads: Sequence[Place],
        *writes: Place,
        matrix: tuple[int, int] | None = None,
    ) -> None:
        for place in (*reads, *writes):
            if place.offset < 0 or place.end_bytes > place.root.size_bytes:
                size = place.root.size_bytes
                raise TransformError(f"{code} would use {place.end_bytes} bytes of memory that has {size}")
        self.instructions.append(
            Instruction(
                code,
                share,
                tuple(words),
                frozenset(p.root.number for p in reads),
                frozenset(p.root.number for p in writes),
                matrix,
            )
        )

    def elementwise(self, code: str, out: Place, *operands: Place, pinned: bool = False) -> Place:
        """Add one instruction over the elements of `out`. If `pinned`, its last dimension is not merged with others.

        Raises:
            TransformError: the instruction does not write the dtype of `out`, or does not read that of an operand.
        """
        written, read = ELEMENTS.get(code, (FLOAT, FLOAT))
        if out.dtype != written or any(operand.dtype != read for operand in operands):
            found = ", ".join(str(operand.dtype) for operand in operands)
            raise TransformError(f"a program has no instruction for {code} of {found} that gives {out.dtype}")
        seen = [operand.broadcast(out.shape) for operand in operands]
        words, share = self.space((out, *seen), pinned)
        self.emit(code, share, words, operands, out)
        return out

    def space(self, places: Sequence[Place], pinned: bool = False) -> tuple[list[Any], Share]:
        """Encoded sizes and operands, with as few dimensions as their strides allow, and who shares the work."""
        share = self.share(places)
        sizes, strides = collapse(places[0].shape, [p.strides for p in places], share is Share.ROWS, pinned)
        words: list[Any] = [len(sizes), *sizes]
        for place, steps in zip(places, strides, strict=True):
            words += [place.ref, *steps]
        if len(sizes) > MOST_DIMS:
            raise TransformError(f"a program has no instruction over {len(sizes)} dimensions; the most are {MOST_DIMS}")
        return words, share

    def share(self, places: Sequence[Place]) -> Share:
        """Divide the work by row if the result has a row for each sequence; else one thread does it."""
        shape = places[0].shape
        return Share.ROWS if self.rows > 1 and len(shape) > 1 and shape[0] == self.rows else Share.SOLO

    def like(self, code: str, out: torch.Tensor, *operands: Place) -> Place:
        """Add an elementwise instruction that writes a new value with the shape and strides of torch's result."""
        return self.elementwise(code, self.new(out.shape, out.dtype, out.stride()), *operands)

    def arithmetic(self, code: str, out: torch.Tensor, a: Any, b: Any) -> Place:
        if out.dtype == torch.int64:
            return self.like(f"{code}_int", out, self.place(a, torch.int64), self.place(b, torch.int64))
        return self.like(code, out, self.floats(a), self.floats(b))

    def arrange(self, x: Place, weights: tuple[int, int, int], inputs: int, tokens: int, sums: bool) -> tuple[Any, Any]:
        """Arrange x as the linear kernels read it, once for all the layers that share it."""
        _, padded, group = weights
        copied = tokens > 1 or padded != inputs
        if not copied and not sums:
            return x, None
        key = (x, padded, group if sums else 0)
        if key not in self._arranged:
            target = self.new((tokens * padded,)) if copied else None
            added = self.new((tokens * padded // group,)) if sums else None
            words = [*weights, inputs, tokens, x.ref, ref(target), ref(added)]
            share = Share.TEAM if copied else Share.SOLO
            self.emit("arrange", share, words, [x], *filter(None, (target, added)))
            self._arranged[key] = target or x, added
        return self._arranged[key]

    def round(self, x: Place, weights: tuple[int, int, int], digits: int) -> Place:
        """Round the inputs of several tokens for products in integers, once for all the layers that share them.

        Each thread rounds those of one token itself.
        """
        _, padded, group = weights
        inputs = x.shape[-1]
        tokens = x.size // inputs
        if tokens == 1:
            return x
        span = next(span for span in SPANS if group % span == 0)
        key = (x, padded, span, digits)
        if key not in self._rounded:
            size = tokens * (padded // span * 3 + -(-padded * digits // 4))  # Rounded::floats in rounded.h
            self._rounded[key] = rounded = self.new((size,))
            self.emit("round", Share.TEAM, [*weights, digits, inputs, tokens, x.ref, rounded.ref], [x], rounded)
        return self._rounded[key]


def ref(place: Place | None) -> Ref:
    return NOWHERE if place is None else place.ref


def collapse(
    shape: Sequence[int], strides: Sequence[Sequence[int]], keep_first: bool, keep_last: bool
) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring dimensions that every operand traverses with one stride.

    Args:
        shape: sizes.
        strides: strides of each operand, in elements.
        keep_first, keep_last: do not merge that dimension with others.

    Returns:
        Sizes and strides of at least one dimension, without those of size 1.
    """
    last = len(shape) - 1
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    fixed = False  # whether merging into the dimension before is forbidden
    for d, size in enumerate(shape):
        pinned = (keep_first and d == 0) or (keep_last and d == last)
        if size == 1 and not pinned:
            continue
        even = all(kept and kept[-1] == own[d] * size for kept, own in zip(steps, strides, strict=True))
        if sizes and even and not pinned and not fixed:
            sizes[-1] *= size
            for kept, own in zip(steps, strides, strict=True):
                kept[-1] = own[d]
        else:
            sizes.append(size)
            for kept, own in zip(steps, strides, strict=True):
                kept.append(own[d])
        fixed = pinned
    return (sizes, steps) if sizes else ([1], [[0] for _ in strides])
