"""Where the time of a phase goes: one request under torch.profiler, its operators attributed to parts of the model.

Modules announce themselves to the profiler through hooks, so attribution follows the structure and not a list of
architectures. A compiled step has no modules left: there, matmuls and attention are known by their operators' names,
and the rest is called "compiled step". Times are those of the operators themselves on the thread that generates; the
profiler's own cost falls between operators and on their callers, which is why the time between them is taken from the
unprofiled measurement.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.autograd.profiler import profile as record  # without Kineto, which only a GPU needs and which logs to stderr
from torch.profiler import record_function

from ..errors import MeasurementError
from ..roofline import classify, intensity
from ..workload import Phase
from . import Operator
from .counts import Work
from .sections import ATTENTION, CACHE, COMPILED, FFN, GROUPS, HEAD, OTHER, OVERHEAD, sections
from .timing import START, TICK, time_request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..variant import Variant

Role = Literal["linear", "attention", "cache"]
Interval = tuple[float, float]  # microseconds of the profiler's clock

RANGE = "autotune.section."
REQUESTS = 2  # traced: enough to have an undisturbed one on most hosts, at half a second each
SMALL_S = 20e-6  # at 25 GB/s an operator this short moves 500 KB at most: its start, not its work, is what it costs

_LINEAR = re.compile(r"linear|(^|_)(mm|addmm|matmul|int_mm|grouped_mm)(_|$)|[a-z\d]pack_mm|gemm|gemv")
_ATTENTION = re.compile(r"attention|attend|^(bmm|baddbmm|_?softmax)$")
_CACHE = re.compile(r"^(index_copy_?|slice_scatter)$|kv_cache|cache_update")
_COMPILED = re.compile(r"CompiledFxGraph|^inductor|^(cpp|triton|graph\d*_cpp)_fused|graph_\d+_")
_DISPATCH = re.compile(r"^(Torch-Compiled Region|TorchDynamo|Pregraph|AOTDispatcher|PyTorch Profiler|autotune\.|\[)")
_RELABELLING = (  # operators that only make or relabel tensors
    "_conj _local_scalar_dense _reshape_alias _reshape_copy _to_copy _unsafe_view alias as_strided chunk contiguous "
    "detach detach_ empty empty_like empty_strided expand expand_as flatten is_nonzero item lift_fresh narrow permute "
    "reshape resize_ resolve_conj resolve_neg result_type select slice split split_with_sizes squeeze t to transpose "
    "unbind unflatten unsqueeze view view_as"
)
_NO_WORK = frozenset(_RELABELLING.split())
_SYNC = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Span:
    """One operator of a trace.

    Args:
        name: without its namespace: "mm".
        seconds: its own time, or its kernels' time on a GPU; children excluded.
        group: part of the model it ran in.
        role: what kind of work it, or the operator that called it, does; None for the rest.
        works: it computes or copies, rather than relabelling a tensor.
        outermost: called from Python, not from another operator.
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
    """

    spans: tuple[Span, ...]
    seconds: float
    sync_s: float = 0.0


def trace(served: PreTrainedModel, watched: Sequence[nn.Module], ids: torch.Tensor, tokens: int) -> dict[Phase, Trace]:
    """Profile a few requests: the fastest prefill and the fastest decode step, which the host disturbed least.

    Args:
        served: the model as it will serve.
        watched: the models whose modules really run; compiled ones are not to be among them.
        ids: prompts, [B, P] int64.
        tokens: tokens to generate, at least two.

    Raises:
        MeasurementError: another profiler is at work.
    """
    on_gpu = ids.device.type == "cuda"
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        raise MeasurementError("another torch profiler is running; stop it, then tune")
    with announced(watched), record(use_device="cuda" if on_gpu else None, use_kineto=on_gpu) as recorded:
        for _ in range(REQUESTS):
            time_request(served, ids, tokens)
    events = [e for e in recorded.function_events if e.device_type.name == "CPU"]
    events.sort(key=lambda e: e.time_range.start)
    thread = next(e.thread for e in events if e.name == START)
    own = [e for e in events if e.thread == thread]
    marks = [(e.name, e.time_range.start) for e in own if e.name in (START, TICK)]
    edges = [time for _, time in marks]
    prefills, steps = list[Interval](), list[Interval]()
    for first in (i for i, (name, _) in enumerate(marks) if name == START):  # then the prompt, then every token
        prefills.append((edges[first], edges[first + 2]))
        steps += pairwise(edges[first + 2 : first + 2 + tokens])
    return {
        "prefill": _trace(own, min(prefills, key=_length), on_gpu),
        "decode": _trace(own, min(steps, key=_length), on_gpu),
    }


def _length(interval: Interval) -> float:
    return interval[1] - interval[0]


def observable(variant: Variant) -> tuple[Variant, list[nn.Module]]:
    """A variant that runs as the given one does and may be watched, and those of its modules that hooks may enter.

    The original is never hooked: a twin over the same tensors stands in for it. Hooks would make a compiled step
    compile again, so that decoding with one is not watched.
    """
    from ..variant import Variant, fork

    original = variant.original
    if not variant.transforms:
        twin = fork(original)
        return Variant(twin), [twin]
    watched = variant._copy()
    watched.modules = {phase: fork(m) if m is original else m for phase, m in variant.modules.items()}
    modules = [watched.modules["prefill"]] + [watched.modules["decode"]] * (variant.step is None)
    return watched, [m for m in modules if all(part._compiled_call_impl is None for part in m.modules())]


@contextmanager
def announced(models: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, the parts of `models` open a range of their group's name in torch.profiler's trace."""
    handles, opened = [], list[Any]()

    def enter(group: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            opened.append(record_function(RANGE + group).__enter__())  # type: ignore[no-untyped-call]

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    try:
        for model in {id(m): m for m in models}.values():
            for name, group in sections(model).items():  # type: ignore[arg-type]
                module = model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(enter(group)))
                handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace(events: Sequence[Any], interval: Interval, on_gpu: bool) -> Trace:
    start, end = interval
    inside = [e for e in events if start <= e.time_range.start < end]
    waits = sum(e.self_cpu_time_total for e in inside if e.name in _SYNC)
    spans = (_span(e, on_gpu) for e in inside if not _DISPATCH.search(e.name) and e.name not in _SYNC)
    return Trace(mark_cache_writes(tuple(spans)), (end - start) / 1e6, waits / 1e6)


def _span(event: Any, on_gpu: bool) -> Span:
    name, group, outermost = event.name.rpartition("::")[2], None, True
    role, compiled, caller = _role(name), bool(_COMPILED.search(event.name)), event.cpu_parent
    while caller is not None and group is None:
        if caller.name.startswith(RANGE):
            group = caller.name.removeprefix(RANGE)
        elif _COMPILED.search(caller.name):
            compiled = True
        elif not _DISPATCH.search(caller.name):
            outermost, role = False, role or _role(caller.name.rpartition("::")[2])
        caller = caller.cpu_parent
    if role == "attention" and group in (FFN, HEAD):
        role = "linear"  # a batched matmul there is one over experts
    seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    return Span(name, seconds, group or (COMPILED if compiled else OTHER), role, name not in _NO_WORK, outermost)


def mark_cache_writes(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Move the spans that write keys and values into a group of their own.

    Static caches copy by index, which no other part of a decoder does. Dynamic ones concatenate, as rotary embeddings
    do, too; but keys and values are the last two concatenations before the attention that reads them.
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


@dataclass(frozen=True)
class Share:
    """What a trace says about a phase, scaled to its unprofiled time; all but the counts in seconds."""

    groups: Mapping[str, float]
    small: Mapping[str, float]
    busy_s: float
    linear_s: float
    attention_s: float
    small_s: float
    operator_count: int
    sync_s: float


def share(trace: Trace, seconds: float) -> Share:
    """Attribute `seconds`, the phase's unprofiled time, to groups; what is left is the framework's.

    Operators are taken as traced unless the host ran at another speed meanwhile: a profiled step can only be slower
    than an unprofiled one, and operators cannot take longer than the step.
    """
    working = [span for span in trace.spans if span.works]
    busy = sum(span.seconds for span in working)
    scale = max(1.0, seconds / trace.seconds)
    scale = min(scale, seconds / busy) if busy else scale
    groups, small = dict[str, float](), dict[str, float]()
    for span in working:
        groups[span.group] = groups.get(span.group, 0.0) + span.seconds * scale
        if span.role is None and span.seconds < SMALL_S:
            small[span.group] = small.get(span.group, 0.0) + span.seconds * scale
    groups[OVERHEAD] = max(0.0, seconds - busy * scale)
    linear, attention = (sum(s.seconds * scale for s in working if s.role == role) for role in ("linear", "attention"))
    return Share(
        groups=groups,
        small=small,
        busy_s=busy * scale,
        linear_s=linear or groups.get(COMPILED, 0.0),  # matmuls that a compiler fused away are all of its step
        attention_s=attention,
        small_s=sum(small.values()),
        operator_count=sum(span.outermost for span in trace.spans),
        sync_s=min(trace.sync_s, seconds),
    )


def table(share: Share, work: Mapping[str, Work], ridge: float) -> tuple[Operator, ...]:
    """The operator table: time as attributed, FLOPs and bytes as counted, one row a group.

    Args:
        share: where the time went.
        work: FLOPs and bytes by group.
        ridge: FLOPs per byte above which this machine computes longer than it moves.
    """
    rows = []
    for group in GROUPS:
        seconds, part = share.groups.get(group, 0.0), work.get(group, Work())
        moved = part.weight_bytes + part.cache_bytes
        if seconds or part.flops or moved:
            limit = _limit(group, seconds, share.small.get(group, 0.0), part.flops, moved, ridge)
            rows.append(Operator(group, seconds, part.flops, moved, limit))
    return tuple(rows)


def _limit(group: str, seconds: float, small_s: float, flops: float, moved: float, ridge: float) -> str:
    if not seconds:
        return "-"
    if group == OVERHEAD or small_s > seconds / 2:
        return "overhead"
    if group == COMPILED and not flops:
        return "-"  # fused: what of it moves or computes is not known
    return classify(intensity(flops, moved), ridge) if moved else "memory"  # element-wise work moves activations


def _role(name: str) -> Role | None:
    if _CACHE.search(name):
        return "cache"
    if _ATTENTION.search(name):
        return "attention"
    return "linear" if _LINEAR.search(name) else None
