"""The operators of a trace, each attributed to a part of the model and to a kind of work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any, Literal

from ..diagnose.parts import ATTENTION, CACHE, COMPILED, FFN, HEAD, OTHER, RANGE
from .recording import DeviceEvent, HostCall
from .timeline import Interval, Timeline, group_of

Role = Literal["linear", "attention", "cache"]
Shapes = Mapping[tuple[int, int], str | None]  # (inputs, outputs) of linear layers -> their group, None if several

_LINEAR = re.compile(
    r"linear|[dD]equantize|(^|_)(mm|addmm|matmul|int_mm|scaled_mm|grouped_mm)(_|$)|[a-z\d]pack_mm|gemm|gemv|"
    r"Gemm|nvjet|splitKreduce|[mM]arlin|triton_\w*(mul_sum|_mm)"  # names of kernels whose operator is unknown
)
_ATTENTION = re.compile(r"attention|attend|^(bmm|baddbmm|_?softmax)$|flash(_|::)|fmha|sdpa")
_CACHE = re.compile(r"^(index_copy_?|slice_scatter)$|index_copy_kernel|kv_cache|cache_update")
FORWARD = "autotune.forward"  # the range of a model's forward in a trace
GENERATED = re.compile(r"CompiledFxGraph|^inductor|^(cpp|triton|graph\d*_cpp)_fused|graph_\d+_")
DISPATCH = re.compile(r"^(Torch-Compiled Region|TorchDynamo|Pregraph|AOTDispatcher|PyTorch Profiler|autotune\.|\[)")
_RELABELLING = (  # operators that only make or relabel tensors
    "_conj _local_scalar_dense _reshape_alias _reshape_copy _to_copy _unsafe_view alias as_strided chunk contiguous "
    "detach detach_ empty empty_like empty_strided expand expand_as flatten is_nonzero item lift_fresh narrow permute "
    "reshape resize_ resolve_conj resolve_neg result_type select slice split split_with_sizes squeeze t to transpose "
    "unbind unflatten unsqueeze view view_as"
)
_NO_WORK = frozenset(_RELABELLING.split())
TINYGEMM_INPUTS = 1024  # torchao fills the inputs of tinygemm's INT4 up to a multiple of this
_KERNEL = re.compile(r"^(?:void )?([\w:]+)")  # a kernel's name without template and arguments


@dataclass(frozen=True)
class Span:
    """One operator of a trace.

    Args:
        name: without its namespace: "mm".
        seconds: its own time, or its kernels' time on a GPU; without its children.
        group: part of the model it ran in.
        role: kind of work that it or its calling operator does; None for other work.
        works: whether it computes or copies; False if it only relabels a tensor.
        outermost: whether it was called from Python, not from another operator.
    """

    name: str
    seconds: float
    group: str
    role: Role | None
    works: bool
    outermost: bool


@dataclass(frozen=True)
class Trace:
    """One profiled call or token.

    Args:
        spans: its operators in order.
        seconds: its duration under the profiler.
        sync_s: time the host waited for the device.
        timeline: what the device did during that time; None on a CPU.
        loop_s: time outside the model's forward; NaN if the trace does not show it.
    """

    spans: tuple[Span, ...]
    seconds: float
    sync_s: float = 0.0
    timeline: Timeline | None = None
    loop_s: float = nan


def outside_forward(interval: Interval, forwards: Iterable[Interval]) -> float:
    """Return the part of an interval that is outside the model's forwards; NaN if it has none."""
    start, end = interval
    inside = [min(until, end) - since for since, until in forwards if start <= since < end]
    return end - start - sum(inside) if inside else nan


def span_of(event: Any, shapes: Shapes, seconds: float) -> Span:
    """Return the span of an operator.

    Args:
        event: a `HostCall`, or an event of torch's profiler.
        shapes: groups of linear layers by shape.
        seconds: the operator's own time.
    """
    name, group, outermost = event.name.rpartition("::")[2], None, True
    role, compiled, caller = _operator_role(event), bool(GENERATED.search(event.name)), _caller(event)
    while caller is not None and group is None:
        if caller.name.startswith(RANGE):
            group = caller.name.removeprefix(RANGE)
        elif GENERATED.search(caller.name):
            compiled = True
        elif not DISPATCH.search(caller.name):
            outermost, role = False, role or _operator_role(caller)
        caller = _caller(caller)
    if role == "attention" and group in (FFN, HEAD):
        role = "linear" if "bmm" in name else None  # in an FFN, a batched matmul is over experts
    if compiled and group is None:
        group = ATTENTION if role == "attention" else by_shape(event.input_shapes, shapes) or COMPILED
    return Span(name, seconds, group or OTHER, role, name not in _NO_WORK, outermost)


def _caller(event: Any) -> Any:
    return event.parent if isinstance(event, HostCall) else event.cpu_parent


def by_shape(inputs: Sequence[Any], shapes: Shapes) -> str | None:
    """Return the group of a matmul over weights, from the shapes of its operands; None if unknown.

    Args:
        inputs: shapes of an operator's arguments; the activations [..., K] come before the weight, which is
            [K, N], [N, K], numbers or packed words [N, ...] before their scales [N, groups], packed in rows of blocks
            [N / block, ..., block], or tinygemm's tiles [N / 8, K / 128, 32, 4], where K and N are padded.
        shapes: (K, N) -> group.
    """
    operands = [shape for shape in inputs or () if len(shape) > 1]
    if len(operands) < 2:
        return None
    (*_, k), weight = operands[0], operands[1]
    if len(weight) == 2:
        has_scales = len(operands) > 2 and operands[2][0] == weight[0]
        return shapes.get((k, weight[1] if weight[0] == k and not has_scales else weight[0]))
    rows, block = weight[0] * weight[-1], weight[-1]  # the last block may be padded
    padding = 1
    if len(weight) == 4:
        rows, block, padding = 8 * weight[0], 8, TINYGEMM_INPUTS
    near = {(inner, n) for inner, n in shapes if k - padding < inner <= k and rows - block < n <= rows}
    found = {shapes[shape] for shape in near}
    return found.pop() if len(found) == 1 else None


def mark_cache_writes(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Move the spans that write keys and values into the group `CACHE`.

    Static caches copy by index, which no other part of a decoder does. Dynamic caches concatenate. So do rotary
    embeddings, but keys and values are the last two concatenations before the attention that reads them.
    """
    marked, joins = list(spans), list[int]()
    for i, span in enumerate(spans):
        if span.role == "cache":
            marked[i] = replace(span, group=CACHE)
        elif span.role == "attention" and joins:
            for j in joins[-2:]:
                marked[j] = replace(spans[j], group=CACHE, role="cache")
            joins.clear()
        elif span.name == "cat" and span.group == ATTENTION and span.outermost:
            joins.append(i)
    return tuple(marked)


def _role(name: str) -> Role | None:
    if _CACHE.search(name):
        return "cache"
    if _ATTENTION.search(name):
        return "attention"
    return "linear" if _LINEAR.search(name) else None


def _operator_role(event: Any) -> Role | None:
    return _role(event.name.rpartition("::")[2]) or _role(event.name)  # FlashAttention 3 is "flash_attn_3::fwd"


def kernel_span(work: DeviceEvent, seconds: float) -> Span:
    """Return the span of a kernel that no operator launched: part of a graph or of generated code."""
    whole = work.name.replace("(anonymous namespace)::", "")
    plain = _KERNEL.match(whole)
    name = plain.group(1).rpartition("::")[2] if plain else whole
    role = _role(name) or _role(whole)  # CUTLASS names what a kernel does in its template's arguments
    group = group_of(work.launch) if work.launch is not None else None
    return Span(
        name, seconds, group or (ATTENTION if role == "attention" else COMPILED), role, works=True, outermost=False
    )
