"""Lower a graph of ATen operators to instructions: views vanish, constants are folded, and the rest maps one to one but
for operators that one instruction computes together (`fusions`)."""

from __future__ import annotations

import operator
from collections.abc import Container
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ....errors import TransformError
from .building import Building
from .fusions import fusions
from .instruction import Instruction, Place, Root
from .operators import KERNELS, OPERATORS

if TYPE_CHECKING:
    from torch.fx import GraphModule

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
        output: the result, in a root of kind "output".
    """

    instructions: tuple[Instruction, ...]
    roots: tuple[Root, ...]
    inputs: tuple[Place, ...]
    output: Place


def lower(graph: GraphModule, rows: int, shared: Container[int] = ()) -> Lowered:
    """Make instructions for a recorded step.

    Args:
        graph: from `trace`.
        rows: values whose first dimension has this size are divided among threads by row.
        shared: numbers of the inputs of which all rows use one row's memory.

    Raises:
        TransformError: an operator has no instruction; the message names it.
    """
    lowering = Lowering(graph, rows, shared)
    for node in graph.graph.nodes:
        lowering.visit(node)
    assert lowering.output is not None  # noqa: S101 - every graph has an output; for the type checker
    lowering.check_shared()
    given = replace(lowering.output.root, kind="output")
    roots = [given if root.number == given.number else root for root in lowering.roots]
    output = replace(lowering.output, root=given)
    return Lowered(tuple(lowering.instructions), tuple(roots), tuple(lowering.inputs), output)


class Lowering(Building):
    """A program under construction from a graph's nodes, one after the other.

    Attributes:
        inputs: the graph's inputs, in order.
        output: the graph's result; None until the output node has been reached.
    """

    def __init__(self, graph: GraphModule, rows: int, shared: Container[int] = ()) -> None:
        super().__init__(rows)
        self.graph = graph
        self.shared = shared
        self._fusions = fusions(graph)
        self._inner = frozenset[Node]().union(*(fusion.inner for fusion in self._fusions.values()))
        self.inputs: list[Place] = []
        self.output: Place | None = None

    def visit(self, node: Node) -> None:
        if node in self._inner:
            return
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
        elif node in self._fusions:
            emit, operands, _ = self._fusions[node]
            self.values[node] = emit(self, node.meta["val"], *operands)
        elif (folded := self.folded(node)) is not None:
            self.values[node] = folded
        elif (view := self.view(node)) is not None:
            self.values[node] = view
        else:
            self.values[node] = self.operator(node)
        if node.op == "call_function":
            self.check(node)

    def check(self, node: Node) -> None:
        """Check that a node's value has the dtype and shape for which the nodes after it were recorded.

        Raises:
            TransformError: the value has another dtype or shape than was recorded.
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

    def check_shared(self) -> None:
        """Check that what rows share is read by attention alone, before which threads meet.

        Raises:
            TransformError: another instruction reads it.
        """
        roots = {place.root.number for i, place in enumerate(self.inputs) if i in self.shared}
        for instruction in self.instructions:
            if instruction.code != "attend" and not roots.isdisjoint(instruction.reads):
                raise TransformError(f"{instruction.code} reads keys or values that rows share")

    def input(self, example: torch.Tensor) -> Place:
        strides = example.stride() if len(self.inputs) not in self.shared else (0, *example.stride()[1:])
        lies = Place(NOTHING, 0, tuple(example.shape), strides, example.dtype)
        root = self.root("input", lies.end_bytes)
        self.inputs.append(replace(lies, root=root))
        return self.inputs[-1]

    def folded(self, node: Node) -> Any:
        """Compute the node's value if it depends on no input, else None."""
        values = [self.values[n] for n in node.all_input_nodes]
        if any(isinstance(v, Place) for v in chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in values)):
            return None
        arguments, keywords = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        with torch.no_grad():
            return node.target(*arguments, **keywords)  # type: ignore[operator]

    def view(self, node: Node) -> Any:
        """The node's value if it is a view of an argument, with the offset and strides that torch gives; else None."""
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
        if held.root.kind == "input" and held.strides != base.stride():
            raise TransformError(f"{node.target} views keys or values that rows share, which a program cannot record")
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
            given = list(reversed(node.args) if exchanged else node.args)
            a, b = (self.place(x, torch.int64) for x in given)
            if {a.dtype, b.dtype} == {torch.int64} and float not in map(type, given):  # 2.5 would count as 2
                return self.like(code, out, a, b)
        if packet in (aten.logical_not, aten.bitwise_not) and out.dtype == torch.bool:
            return self.like("not", out, self.place(node.args[0]))
        if packet in LOGIC and out.dtype == torch.bool:
            return self.like(LOGIC[packet], out, *(self.place(x, torch.bool) for x in node.args))
        if handler := OPERATORS.get(packet) or KERNELS.get(str(packet)):
            try:
                return handler(self, out, *node.args, **node.kwargs)
            except (KeyError, TypeError) as error:  # a dtype or an argument that the handler does not know
                raise TransformError(f"a program has no instruction for this use of {target}") from error
        raise TransformError(f"a program has no instruction for {target}")


def _attribute(graph: GraphModule, path: str) -> torch.Tensor:
    """A tensor that the step reads.

    Raises:
        TransformError: it is not a plain tensor but a library's object, which no instruction can read.
    """
    value = operator.attrgetter(path)(graph)
    if not isinstance(value, torch.Tensor):
        raise TransformError(f"a program cannot read {path}, which is a {type(value).__name__}, not a tensor")
    return value.detach()
