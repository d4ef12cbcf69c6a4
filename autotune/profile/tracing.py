"""A few requests under torch's profiler, every operator attributed to a part of the model.

Modules announce themselves to the profiler through hooks, so attribution follows the structure and not a list of
architectures. A compiled step has no modules left: there, a matmul is known by the shape of its weight and attention by
its operator's name, and the rest is called "compiled step". Times are those of the operators themselves on the thread
that generates; the profiler's own cost falls between operators and on their callers, which is why the time between them
is taken from the unprofiled measurement. On a GPU an operator's time is that of the kernels it launched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.autograd.profiler import profile as record  # torch.profiler would trace every thread
from torch.profiler import record_function

from .. import device as devices
from ..device.trace import silent_kineto
from ..errors import MeasurementError
from ..workload import Phase
from .counts import matrices
from .recording import OPERATOR, Call, Recording, Work, read
from .sections import ATTENTION, CACHE, COMPILED, FFN, HEAD, OTHER, RANGE, sections
from .timeline import Timeline, group_of, seconds_by_caller, timeline
from .timing import START, TICK, time_request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..program.instruction import Instruction
    from ..variant import Variant

Role = Literal["linear", "attention", "cache"]
Shapes = Mapping[tuple[int, int], str | None]  # (inputs, outputs) of linear layers -> their group, None if several
Interval = tuple[float, float]  # of the profiler's clock

_LINEAR = re.compile(r"linear|(^|_)(mm|addmm|matmul|int_mm|scaled_mm|grouped_mm)(_|$)|[a-z\d]pack_mm|gemm|gemv|nvjet")
_ATTENTION = re.compile(r"attention|attend|^(bmm|baddbmm|_?softmax)$|flash_|fmha|sdpa")
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
_KERNEL = re.compile(r"^(?:void )?([\w:]+)")  # a kernel's name without its template and its arguments
PROGRAM = "run_program"
PROGRAM_ROLES: dict[str, Role] = {"linear": "linear", "dot": "linear", "attend": "attention", "index_copy": "cache"}
PROGRAM_GROUPS = {"attend": ATTENTION, "index_copy": CACHE}


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
        timeline: what the device did meanwhile; None where there is none but the CPU.
    """

    spans: tuple[Span, ...]
    seconds: float
    sync_s: float = 0.0
    timeline: Timeline | None = None


@dataclass(frozen=True)
class Watched:
    """A variant that runs as another one does, and what is known of its modules.

    Args:
        variant: the one to run.
        open: models whose modules hooks may enter.
        compiled: models that run as compiled code, where hooks would not be called or would compile it again.
    """

    variant: Variant
    open: tuple[PreTrainedModel, ...]
    compiled: tuple[PreTrainedModel, ...]


def watched(variant: Variant) -> Watched:
    """How to watch a variant. The original is never hooked: a twin over the same tensors stands in for it."""
    from ..variant import Variant, fork

    original = variant.original
    if not variant.transforms:
        twin = fork(original)
        return Watched(Variant(twin, variant.traffic, variant.workload), (twin,), ())
    copy = variant._copy()
    copy.speculation = None  # a token that was guessed right has no step of its own
    copy.modules = {phase: fork(m) if m is original else m for phase, m in variant.modules.items()}
    stepped = {id(copy.modules["decode"])} if variant.step is not None else set()
    closed = {id(m) for m in copy.modules.values() if any(part._compiled_call_impl for part in m.modules())}
    models = {id(m): m for m in copy.modules.values()}
    return Watched(
        copy,
        tuple(m for i, m in models.items() if i not in stepped | closed),
        tuple(m for i, m in models.items() if i in stepped | closed),
    )


def trace(subject: Watched, ids: torch.Tensor, tokens: int, requests: int = 1) -> dict[Phase, Trace]:
    """Profile a few requests: the fastest prefill and the fastest decode step, which the host disturbed least.

    Args:
        subject: what to run and watch.
        ids: prompts, [B, P] int64.
        tokens: tokens to generate, at least two.
        requests: how many; with two, there is an undisturbed one on most hosts.

    Raises:
        MeasurementError: another profiler is at work.
    """
    from ..program import StepPrograms
    from ..variant import serving

    device = devices.of(ids.device)
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        raise MeasurementError("another torch profiler is running; stop it, then tune")
    served, shapes = serving(subject.variant), matrices(subject.compiled)
    if device.asynchronous:
        with announced(subject.open):
            recording = read(device.trace(lambda: [time_request(served, ids, tokens) for _ in range(requests)]))
        return on_device(recording, shapes)
    recorder = record(use_kineto=False, record_shapes=bool(shapes))
    step = subject.variant.step
    timed = step.timed() if isinstance(step, StepPrograms) else nullcontext()
    with announced(subject.open), silent_kineto(), timed, recorder as recorded:
        for _ in range(requests):
            time_request(served, ids, tokens)
    program = step.program(len(ids)) if isinstance(step, StepPrograms) else None
    parts = instructions(program.times(), shapes) if program else ()
    events = [e for e in recorded.function_events if e.device_type.name == "CPU"]
    events.sort(key=lambda e: e.time_range.start)
    thread = next(e.thread for e in events if e.name == START)
    own = [e for e in events if e.thread == thread]
    prefills, steps = intervals((e.name, e.time_range.start) for e in own if e.name in (START, TICK))
    return {
        "prefill": _trace(own, min(prefills, key=_length), shapes),
        "decode": unfolded(_trace(own, min(steps, key=_length), shapes), parts),
    }


def on_device(recording: Recording, shapes: Shapes) -> dict[Phase, Trace]:
    """The fastest prefill and the median decode step of a recording.

    The median, as a loop that runs ahead of the device hands out tokens unevenly: two may arrive close together.

    Raises:
        MeasurementError: no request is in it.
    """
    marks = [(call.name, call.start_s) for call in recording.calls if call.name in (START, TICK)]
    prefills, steps = intervals(marks)
    if not prefills or not steps:
        raise MeasurementError("the profiler's trace has no whole request in it; free memory for its buffers")
    return {
        "prefill": _device_trace(recording, min(prefills, key=_length), shapes),
        "decode": _device_trace(recording, sorted(steps, key=_length)[len(steps) // 2], shapes),
    }


def _device_trace(recording: Recording, interval: Interval, shapes: Shapes) -> Trace:
    """Operators called in the interval with the time of the kernels they launched, and kernels without an operator."""
    start, end = interval
    found = timeline(recording, interval)
    seconds, spans = seconds_by_caller(recording), list[tuple[float, Span]]()
    for call in recording.calls:
        if call.category == OPERATOR and start <= call.start_s < end and not _DISPATCH.search(call.name):
            span = _span(call, shapes, seconds.get(call, 0.0))
            spans.append((call.start_s, replace(span, works=call in seconds)))
    for work in recording.work:
        at = work.launch.start_s if work.launch is not None else work.start_s
        if work.operator is None and start <= at < end:
            spans.append((at, _kernel_span(work)))
    spans.sort(key=lambda each: each[0])
    return Trace(mark_cache_writes(tuple(span for _, span in spans)), end - start, found.sync_s, found)


def _kernel_span(work: Work) -> Span:
    """A kernel that no operator launched: part of a graph or of generated code."""
    plain = _KERNEL.match(work.name)
    name = plain.group(1).rpartition("::")[2] if plain else work.name
    role = _role(name)
    group = work.launch and group_of(work.launch)
    return Span(
        name, work.seconds, group or (ATTENTION if role == "attention" else COMPILED), role, works=True, outermost=False
    )


def instructions(spent: Sequence[tuple[Instruction, float]], shapes: Shapes) -> tuple[Span, ...]:
    """A program's instructions as the spans of the operators they stand for."""
    spans = list[Span]()
    for instruction, seconds in spent:
        role = PROGRAM_ROLES.get(instruction.code)
        group = PROGRAM_GROUPS.get(instruction.code, COMPILED)
        if instruction.matrix is not None:
            group = shapes.get(instruction.matrix) or COMPILED
        spans.append(Span(instruction.code, seconds, group, role, works=True, outermost=False))
    return tuple(spans)


def unfolded(trace: Trace, program: tuple[Span, ...]) -> Trace:
    """The trace with its program's one operator replaced by its instructions, which take its time between them."""
    whole = next((span for span in trace.spans if span.name == PROGRAM), None)
    total_s = sum(span.seconds for span in program)
    if whole is None or not total_s:
        return trace
    parts = [replace(span, seconds=span.seconds * whole.seconds / total_s) for span in program]
    parts[0] = replace(parts[0], outermost=True)  # one call from Python
    return replace(trace, spans=(*(span for span in trace.spans if span is not whole), *parts))


def intervals(marks: Iterable[tuple[str, float]]) -> tuple[list[Interval], list[Interval]]:
    """From a request's start to its first token, and from token to token.

    Args:
        marks: the names START and TICK with their times, in order.
    """
    prefills, steps, ticks = list[Interval](), list[Interval](), list[float]()
    for name, at in marks:
        ticks = [at] if name == START else [*ticks, at]
        if len(ticks) == 3:  # start, prompt handed over, first token
            prefills.append((ticks[0], ticks[2]))
        elif len(ticks) > 3:
            steps.append((ticks[-2], ticks[-1]))
    return prefills, steps


def _length(interval: Interval) -> float:
    return interval[1] - interval[0]


@contextmanager
def announced(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Within it, the parts of `models` open a range of their group's name in torch.profiler's trace."""
    handles, opened = [], list[Any]()

    def enter(group: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            opened.append(record_function(RANGE + group).__enter__())  # type: ignore[no-untyped-call]

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    try:
        for model in models:
            for name, group in sections(model).items():
                module = model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(enter(group)))
                handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace(events: Sequence[Any], interval: Interval, shapes: Shapes) -> Trace:
    start, end = interval  # microseconds
    inside = [e for e in events if start <= e.time_range.start < end]
    spans = (_span(e, shapes, e.self_cpu_time_total / 1e6) for e in inside if not _DISPATCH.search(e.name))
    return Trace(mark_cache_writes(tuple(spans)), (end - start) / 1e6)


def _span(event: Any, shapes: Shapes, seconds: float) -> Span:
    """The span of an operator: a `Call`, or an event of torch's profiler.

    Args:
        seconds: what is its own of the time.
    """
    name, group, outermost = event.name.rpartition("::")[2], None, True
    role, compiled, caller = _role(name), bool(_COMPILED.search(event.name)), _caller(event)
    while caller is not None and group is None:
        if caller.name.startswith(RANGE):
            group = caller.name.removeprefix(RANGE)
        elif _COMPILED.search(caller.name):
            compiled = True
        elif not _DISPATCH.search(caller.name):
            outermost, role = False, role or _role(caller.name.rpartition("::")[2])
        caller = _caller(caller)
    if role == "attention" and group in (FFN, HEAD):
        role = "linear" if "bmm" in name else None  # a batched matmul there is one over experts
    if compiled and group is None:
        group = ATTENTION if role == "attention" else by_shape(event.input_shapes, shapes) or COMPILED
    return Span(name, seconds, group or OTHER, role, name not in _NO_WORK, outermost)


def _caller(event: Any) -> Any:
    return event.parent if isinstance(event, Call) else event.cpu_parent


def by_shape(inputs: Sequence[Any], shapes: Shapes) -> str | None:
    """The group whose matmul over weights this is, judged by the shapes of its operands.

    Args:
        inputs: shapes of an operator's arguments; the activations [..., K] come before the weight, which is
            [K, N], [N, K], or packed in rows of blocks [N / block, ..., block].
        shapes: (K, N) -> group.
    """
    operands = [shape for shape in inputs or () if len(shape) > 1]
    if len(operands) < 2:
        return None
    (*_, k), weight = operands[0], operands[1]
    if len(weight) == 2:
        n = weight[0] if weight[1] == k else weight[1]
        return shapes.get((k, n))
    rows, block = weight[0] * weight[-1], weight[-1]  # the last block may be padded
    found = {group for (inner, n), group in shapes.items() if inner == k and rows - block < n <= rows}
    return found.pop() if len(found) == 1 else None


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


def _role(name: str) -> Role | None:
    if _CACHE.search(name):
        return "cache"
    if _ATTENTION.search(name):
        return "attention"
    return "linear" if _LINEAR.search(name) else None
