"""Operators of a recorded step that one instruction computes together: norms, rotations, gated products.

A step of one token spends a tenth of its time on short instructions, which wait for each other. An operator within a
pattern has no instruction of its own, so nothing else may read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, permutations
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from .building import Building
from .instruction import Place, Share

aten = torch.ops.aten


class Fusion(NamedTuple):
    """What one instruction computes.

    Args:
        emit: adds the instruction for (building, fake result, *operands).
        operands: nodes and numbers.
        inner: the operators that need none of their own.
    """

    emit: Callable[..., Place]
    operands: tuple[Any, ...]
    inner: frozenset[Node]


def fusions(graph: GraphModule) -> dict[Node, Fusion]:
    """The patterns of a graph, each by the node of its result."""
    found: dict[Node, Fusion] = {}
    inner = set[Node]()
    for node in reversed(graph.graph.nodes):  # results come before what they are made of, which no other may claim
        for fusion in () if node in inner else chain(norm(node), rotation(node), gated(node)):
            if all(set(n.users) <= fusion.inner | {node} for n in fusion.inner):
                found[node] = fusion
                inner |= fusion.inner
                break
    return found


def norm(node: Node) -> Iterator[Fusion]:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension."""
    for scaled, weight in _operands(node, aten.mul.Tensor):
        for x, root in _operands(scaled, aten.mul.Tensor):
            (shifted, *_) = _arguments(root, aten.rsqrt.default)
            means, eps = _arguments(shifted, aten.add.Tensor)[:2]
            squares, dims, *keep = _arguments(means, aten.mean.dim)
            if keep != [True] or list(dims) not in ([-1], [x.meta["val"].dim() - 1]) or not isinstance(eps, float):
                continue
            whole = _sizes(weight) == _sizes(x)[-1:] and _is_constant(weight)
            if _arguments(squares, aten.pow.Tensor_Scalar) == (x, 2) and whole:
                yield Fusion(_emit_norm, (x, weight, eps), frozenset({scaled, root, shifted, means, squares}))


def rotation(node: Node) -> Iterator[Fusion]:
    """x * cos + cat(-second half of x, first half) * sin."""
    for straight, crossed in _operands(node, aten.add.Tensor):
        for x, cosine in _operands(straight, aten.mul.Tensor):
            for turned, sine in _operands(crossed, aten.mul.Tensor):
                halves, *dims = _arguments(turned, aten.cat.default)
                if dims not in ([-1], [x.meta["val"].dim() - 1]) or len(halves) != 2:
                    continue
                (second,) = _arguments(halves[0], aten.neg.default)[:1]
                rows = all(n.meta["val"].stride(-1) == 1 for n in (x, cosine, sine, node))
                if rows and _is_half(halves[1], x, 0) and _is_half(second, x, 1):
                    yield Fusion(_emit_rotation, (x, cosine, sine), frozenset({straight, crossed, turned, halves[0]}))


def gated(node: Node) -> Iterator[Fusion]:
    """silu(gate) * up, or the same with GELU's tanh form."""
    for curved, up in _operands(node, aten.mul.Tensor):
        if not _sizes(curved) == _sizes(up) == _sizes(node):
            continue
        if curved.target is aten.silu.default:
            yield Fusion(_emit_gated, ("gate_silu", curved.args[0], up), frozenset({curved}))
        elif curved.target is aten.gelu.default and curved.kwargs.get("approximate") == "tanh":
            yield Fusion(_emit_gated, ("gate_gelu_tanh", curved.args[0], up), frozenset({curved}))


def _emit_norm(build: Building, out: torch.Tensor, given: Any, weight: Any, eps: float) -> Place:
    x, scale = build.dense(given), build.dense(weight)
    normal = build.new(x.shape)
    words, share = build.space((normal, x), pinned=True)
    build.emit("rms", share, [*words, scale.ref, eps], [x, scale], normal)
    return normal


def _emit_rotation(build: Building, out: torch.Tensor, given: Any, cosine: Any, sine: Any) -> Place:
    x = build.floats(given)
    turned = build.new(out.shape, out.dtype, out.stride())
    return build.elementwise("rotate", turned, x, build.floats(cosine), build.floats(sine), pinned=True)


def _emit_gated(build: Building, out: torch.Tensor, code: str, gate: Any, up: Any) -> Place:
    result = build.new(out.shape, out.dtype, out.stride())
    factors = build.floats(gate), build.floats(up)
    words, share = build.space((result, *(factor.broadcast(result.shape) for factor in factors)))
    build.emit(code, Share.TEAM if share is Share.SOLO else share, words, factors, result)
    return result


def _operands(node: Any, target: Any) -> Iterator[tuple[Node, Node]]:
    """Both orders of the operands of a commutative operator; nothing if the node is another or has numbers."""
    given = _arguments(node, target)
    if len(given) == 2 and not node.kwargs and all(isinstance(each, Node) for each in given):
        yield from permutations(given)


def _arguments(node: Any, target: Any) -> tuple[Any, ...]:
    """The arguments of a node of this operator, else three times None."""
    is_it = isinstance(node, Node) and node.op == "call_function" and node.target is target
    return node.args if is_it else (None, None, None)


def _sizes(node: Node) -> list[int]:
    return list(node.meta["val"].shape)


def _is_constant(node: Node) -> bool:
    """Whether a node depends on no input."""
    return node.op == "get_attr" or (node.op == "call_function" and all(map(_is_constant, node.all_input_nodes)))


def _is_half(node: Any, whole: Node, which: int) -> bool:
    """Whether a node is the first (0) or the second (1) half of another's last dimension."""
    if not isinstance(node, Node) or node.args[:1] != (whole,) or node.target is not aten.slice.Tensor:
        return False
    part, all_of = node.meta["val"], whole.meta["val"]
    size = all_of.shape[-1] // 2
    shape, offset = (*all_of.shape[:-1], size), all_of.storage_offset() + which * size
    is_even: bool = 2 * size == all_of.shape[-1]
    return is_even and part.shape == shape and part.stride() == all_of.stride() and part.storage_offset() == offset
