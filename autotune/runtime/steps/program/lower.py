"""From a graph of ATen operators to instructions: views vanish, constants are folded, the rest maps one to one."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from ....errors import TransformError
from .instruction import ELEMENTS, FLOAT, MOST_DIMS, Instruction, Place, Root, Share, dense
from .operators import KERNELS, OPERATORS, ref

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

aten = torch.ops.aten

UNARY = {
    aten.neg.default: "negative",
    aten.rsqrt.default: "inverse_root",
    aten.sqrt.default: "root",
    aten.exp.default: "exp",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.cos.default: "cos",
    aten.sin.default: "sin",
    aten.reciprocal.default: "reciprocal",
}
BINARY = {
    aten.add: "add",
    aten.sub: "subtract",
    aten.mul: "multiply",
    aten.div: "divide",
    aten.maximum: "larger",
    aten.minimum: "smaller",
}
COMPARISONS = {aten.lt: ("less_int", False), aten.le: ("less_equal_int", False), aten.eq: ("equal_int", False)}
COMPARISONS |= {aten.gt: ("less_int", True), aten.ge: ("less_equal_int", True)}  # with the operands exchanged
NOTHING = Root(-1, "temporary", 0)
LOGIC = {aten.bitwise_and: "and", aten.logical_and: "and", aten.bitwise_or: "or", aten.logical_or: "or"}


@dataclass(frozen=True)
class Lowered:
    """A step as instructions.

    Args:
        inputs: the graph's inputs, in order.
        output: in a root of kind "output".
    """

    instructions: tuple[Instruction, ...]
    roots: tuple[Root, ...]
    inputs: tuple[Place, ...]
    output: Place


def lower(graph: GraphModule, rows: int) -> Lowered:
    """Instructions for a recorded step.

    Args:
        graph: from `trace`.
        rows: values whose first dimension has this size are shared out among threads by row.

    Raises:
        TransformError: an operator has no instruction; it is named.
    """
    lowering = Lowering(graph, rows)
    for node in graph.graph.nodes:
        lowering.visit(node)
    assert lowering.output is not None  # noqa: S101 - every graph has an output; for the type checker
    roots = [replace(r, kind="output") if r.number == lowering.output.root.number else r for r in lowering.roots]
    return Lowered(tuple(lowering.instructions), tuple(roots), tuple(lowering.inputs), lowering.output)


class Lowering:
    def __init__(self, graph: GraphModule, rows: int) -> None:
        self.graph, self.rows = graph, rows
        self.roots: list[Root] = []
        self.inputs: list[Place] = []
        self.instructions: list[Instruction] = []
        self.values: dict[Node, Any] = {}  # a Place, a constant tensor, or a tuple of them
        self.constants: dict[int, Root] = {}
        self.arranged: dict[tuple[Any, ...], tuple[Place, Place | None]] = {}
        self.output: Place | None = None

    # Values

    def root(self, kind: Any, size_bytes: int, tensor: torch.Tensor | None = None) -> Root:
        self.roots.append(Root(len(self.roots), kind, size_bytes, tensor))
        return self.roots[-1]

    def new(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, strides: Sequence[int] = ()) -> Place:
        """A temporary; contiguous unless strides are given."""
        root = self.root("temporary", math.prod(shape) * dtype.itemsize)
        return Place(root, 0, tuple(shape), tuple(strides) or dense(shape), dtype)

    def constant(self, tensor: torch.Tensor) -> Place:
        key = tensor.untyped_storage().data_ptr()
        if key not in self.constants:
            whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
            self.constants[key] = self.root("constant", whole.numel(), whole)
        return Place(
            self.constants[key], int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype
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
        """One instruction over the elements of `out`; pinned: the last dimension stays one of its own.

        Raises:
            TransformError: it does not write the dtype of `out`, or does not read that of an operand.
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
        """By row where every operand has one for each sequence, or is the same for all."""
        shape = places[0].shape
        return Share.ROWS if self.rows > 1 and len(shape) > 1 and shape[0] == self.rows else Share.SOLO

    # The graph

    def visit(self, node: Node) -> None:
        if node.op == "placeholder":
            self.values[node] = self.input(node.meta["val"])
        elif node.op == "get_attr":
            self.values[node] = _attribute(self.graph, str(node.target))
        elif node.op == "output":
            returned: Any = node.args[0]
            self.output = self.dense(returned[0] if isinstance(returned, list | tuple) else returned)
            if self.output.root.kind != "temporary":
                self.output = self.elementwise("copy", self.new(self.output.shape), self.output)
        elif node.target is operator.getitem:
            whole, index = node.args
            self.values[node] = self.values[whole][index]  # type: ignore[index]
        elif (folded := self.folded(node)) is not None:
            self.values[node] = folded
        elif (view := self.view(node)) is not None:
            self.values[node] = view
        else:
            self.values[node] = self.operator(node)
        if node.op == "call_function":
            self.check(node)

    def check(self, node: Node) -> None:
        """What follows was recorded for the dtypes and shapes that torch gave: nothing else may stand in their place.

        Raises:
            TransformError: a value is of another dtype or shape than was recorded.
        """
        made: Any = self.values[node]
        recorded: Any = node.meta.get("val")
        parts = zip(made, recorded, strict=True) if isinstance(made, tuple | list) else [(made, recorded)]
        for value, example in parts:
            if value is None or not isinstance(example, torch.Tensor):
                continue
            if value.dtype != example.dtype or tuple(value.shape) != tuple(example.shape):
                there, here = f"{example.dtype} {list(example.shape)}", f"{value.dtype} {list(value.shape)}"
                raise TransformError(f"{node.target} was recorded as {there}, and gives {here}")

    def input(self, example: torch.Tensor) -> Place:
        lies = Place(NOTHING, 0, tuple(example.shape), example.stride(), example.dtype)
        root = self.root("input", lies.end_bytes)
        self.inputs.append(replace(lies, root=root))
        return self.inputs[-1]

    def folded(self, node: Node) -> Any:
        """What the node comes to, where it depends on no input; None where it does."""
        values = [self.values[n] for n in node.all_input_nodes]
        if any(isinstance(v, Place) for v in chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in values)):
            return None
        arguments, keywords = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        with torch.no_grad():
            return node.target(*arguments, **keywords)  # type: ignore[operator]

    def view(self, node: Node) -> Any:
        """The value where it is a view of an argument (torch says how it lies), or None."""
        source = node.args[0]
        if not isinstance(source, torch.fx.Node) or not isinstance(self.values[source], Place):
            return None
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.is_mutable:
            return None
        base, held = source.meta["val"], self.values[source]

        def seen(value: torch.Tensor) -> Place:
            offset = held.offset + value.storage_offset() - base.storage_offset()
            return Place(held.root, offset, tuple(value.shape), value.stride(), value.dtype)

        value = node.meta["val"]
        parts = value if isinstance(value, list | tuple) else (value,)
        same = base.untyped_storage()._cdata
        if any(not isinstance(p, torch.Tensor) or p.untyped_storage()._cdata != same for p in parts):
            return None
        return seen(value) if isinstance(value, torch.Tensor) else tuple(map(seen, parts))

    def operator(self, node: Node) -> Any:
        target: Any = node.target
        out = node.meta["val"]
        if target in UNARY:
            return self.like(UNARY[target], out, self.floats(node.args[0]))
        packet = getattr(target, "overloadpacket", None)
        if packet in BINARY and not node.kwargs:
            return self.arithmetic(BINARY[packet], out, *node.args)
        if packet in COMPARISONS:
            code, exchanged = COMPARISONS[packet]
            a, b = (self.place(x, torch.int64) for x in (reversed(node.args) if exchanged else node.args))
            if {a.dtype, b.dtype} == {torch.int64}:
                return self.like(code, out, a, b)
        if packet in (aten.logical_not, aten.bitwise_not) and out.dtype == torch.bool:
            return self.like("not", out, self.place(node.args[0]))
        if packet in LOGIC and out.dtype == torch.bool:
            return self.like(LOGIC[packet], out, *(self.place(x, torch.bool) for x in node.args))
        if handler := OPERATORS.get(packet) or KERNELS.get(str(packet)):
            return handler(self, out, *node.args, **node.kwargs)
        raise TransformError(f"a program has no instruction for {target}")

    def like(self, code: str, out: torch.Tensor, *operands: Place) -> Place:
        """An elementwise instruction into a new value that lies as torch's result does."""
        return self.elementwise(code, self.new(out.shape, out.dtype, out.stride()), *operands)

    def arithmetic(self, code: str, out: torch.Tensor, a: Any, b: Any) -> Place:
        if out.dtype == torch.int64:
            return self.like(f"{code}_int", out, self.place(a, torch.int64), self.place(b, torch.int64))
        return self.like(code, out, self.floats(a), self.floats(b))

    def arrange(self, x: Place, weights: tuple[int, int, int], inputs: int, tokens: int, sums: bool) -> tuple[Any, Any]:
        """x as the linear kernels read it, made once for all the layers that share it."""
        _, padded, group = weights
        copied = tokens > 1 or padded != inputs
        if not copied and not sums:
            return x, None
        key = (x, padded, group if sums else 0)
        if key not in self.arranged:
            target = self.new((tokens * padded,)) if copied else None
            added = self.new((tokens * padded // group,)) if sums else None
            words = [*weights, inputs, tokens, x.ref, ref(target), ref(added)]
            share = Share.TEAM if copied else Share.SOLO
            self.emit("arrange", share, words, [x], *filter(None, (target, added)))
            self.arranged[key] = target or x, added
        return self.arranged[key]


def collapse(
    shape: Sequence[int], strides: Sequence[Sequence[int]], keep_first: bool, keep_last: bool
) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring dimensions that every operand steps through evenly.

    Args:
        shape: sizes.
        strides: of each operand, in elements.
        keep_first, keep_last: leave that dimension to itself.

    Returns:
        Sizes and strides of at least one dimension, without those of size 1.
    """
    last = len(shape) - 1
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    fixed = False  # whether the dimension before may not be merged into
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


def _attribute(graph: GraphModule, path: str) -> torch.Tensor:
    value: torch.Tensor = operator.attrgetter(path)(graph)
    return value.detach()
