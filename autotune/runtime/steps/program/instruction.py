"""The parts of a step program: values, the memory that holds them, and the instructions over them."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import torch

CODES = (  # the order of Code in kernels/instructions.h
    *("copy", "to_float", "widen_half", "widen_bf16", "narrow_half", "copy_int", "copy_bool"),
    *("negative", "inverse_root", "root", "exp", "tanh", "sigmoid"),
    *("silu", "relu", "gelu", "gelu_tanh", "cos", "sin", "square", "cube", "reciprocal", "not"),
    *("add", "subtract", "multiply", "divide", "larger", "smaller", "add_int", "subtract_int", "multiply_int"),
    *("less_int", "less_equal_int", "equal_int", "and", "or"),
    *("mean", "normalize", "rms", "rotate", "gate_silu", "gate_gelu_tanh", "embed", "embed_packed", "index_copy"),
    *("arrange", "linear", "round", "linear_rounded", "dot", "attend"),
)
FLOAT, INT, BOOL = torch.float32, torch.int64, torch.bool
ELEMENTS = {  # dtypes that elementwise instructions write and read; the others compute in FP32
    **dict.fromkeys(("copy_int", "add_int", "subtract_int", "multiply_int"), (INT, INT)),
    **dict.fromkeys(("less_int", "less_equal_int", "equal_int"), (BOOL, INT)),
    **dict.fromkeys(("copy_bool", "not", "and", "or"), (BOOL, BOOL)),
    "to_float": (FLOAT, INT),
    "widen_half": (FLOAT, torch.float16),
    "widen_bf16": (FLOAT, torch.bfloat16),
    "narrow_half": (torch.float16, FLOAT),
}
MOST_DIMS = 5  # kMostDims in kernels/elementwise.h
SPANS = (32, 8)  # inputs that are rounded together for products in integers: kSpans in kernels/rounded.h
FORMATS = (  # dtypes of packed numbers, in the order of kKernels in kernels/instructions.h
    *(torch.float32, torch.float16, torch.bfloat16),
    *(torch.int8, torch.int32, torch.int16),  # of 8, 4 and 6 bits
)
TYPES = {torch.float32: 6, torch.float16: 5, torch.bfloat16: 15}  # torch's ScalarType


class Share(IntEnum):
    """How threads share an instruction; the order of Share in kernels/instructions.h."""

    SOLO = 0  # only the first thread works: there is too little work to share
    ROWS = 1  # each thread computes a part of the sequences
    TEAM = 2  # each thread computes a part of the result


@dataclass(frozen=True)
class Root:
    """A piece of memory that holds values.

    Args:
        kind: "temporary" (the program's own, reused), "constant" (a tensor that outlives the program's calls),
            "input" (given with each call) or "output" (the program's own, kept).
        size_bytes: its size.
        tensor: the tensor that a constant's memory belongs to; None for other kinds.
    """

    number: int
    kind: Literal["temporary", "constant", "input", "output"]
    size_bytes: int
    tensor: torch.Tensor | None = None


@dataclass(frozen=True)
class Place:
    """A value: a strided view of a root, like torch's views of a storage.

    Args:
        offset: index of the first element, in elements.
        strides: strides in elements.
    """

    root: Root
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def ref(self) -> Ref:
        return Ref(self.root.number, self.offset * self.dtype.itemsize)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def end_bytes(self) -> int:
        """The end of the value, in bytes from the root's start."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (self.offset + last + 1) * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        steps = zip(self.shape, self.strides, dense(self.shape), strict=True)
        return all(size == 1 or own == wanted for size, own, wanted in steps)

    def broadcast(self, shape: tuple[int, ...]) -> Place:
        """The same numbers seen as `shape`, repeated with stride 0."""
        missing = len(shape) - len(self.shape)
        own = (1,) * missing + self.shape
        strides = (0,) * missing + self.strides
        kept = tuple(0 if size == 1 else stride for size, stride in zip(own, strides, strict=True))
        return replace(self, shape=shape, strides=kept)


def dense(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of contiguous values."""
    steps = itertools.accumulate((max(size, 1) for size in reversed(shape[1:])), operator.mul, initial=1)
    return tuple(steps)[::-1] if shape else ()


@dataclass(frozen=True)
class Ref:
    """An address: the number of a root and an offset in bytes."""

    root: int
    offset_bytes: int


NOWHERE = Ref(-1, 0)


@dataclass(frozen=True)
class Instruction:
    """One step of a program.

    Args:
        words: the encoded form after the header: integers, FP64 numbers and addresses.
        reads, writes: numbers of the roots that it reads and writes.
        matrix: (inputs, outputs) of the weights that it multiplies by; None if it does not.
    """

    code: str
    share: Share
    words: tuple[int | float | Ref, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    matrix: tuple[int, int] | None = None
