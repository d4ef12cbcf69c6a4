"""Run a few requests under torch's profiler, and attribute every operator to a part of the model.

Hooks on modules open named ranges in the profiler, so attribution follows the model's structure and needs no list of
architectures. A compiled step has no modules: there, a matmul is identified by the shape of its weight and attention by
its operator's name, and the rest is called "compiled step". Times are the operators' own times on the thread that
generates. The profiler's own cost adds to the time between operators and to their callers, so the time between
operators is taken from the unprofiled measurement. On a GPU, an operator's time is that of the kernels it launched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.profiler import profile as record  # torch.profiler would trace every thread
from torch.profiler import record_function

from ..diagnose.parts import ATTENTION, CACHE, COMPILED, RANGE, sections
from ..diagnose.work import matrices
from ..errors import MeasurementError
from ..machine import device as devices
from ..machine.device.trace import silent_kineto
from ..model import twins
from ..workload import Phase
from .phases import intervals, length, on_device
from .recording import read
from .spans import DISPATCH, FORWARD, Role, Shapes, Span, Trace, mark_cache_writes, outside_forward, span_of
from .timeline import Interval
from .timing import START, TICK, time_request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..runtime.steps.program.instruction import Instruction
    from ..runtime.variant import Variant

PROGRAM = "run_program"
# Of a program's instructions other than products with a matrix of weights.
PROGRAM_ROLES: dict[str, Role] = {"attend": "attention", "index_copy": "cache", "narrow_half": "cache"}
PROGRAM_GROUPS = {"attend": ATTENTION, "index_copy": CACHE, "narrow_half": CACHE}


@dataclass(frozen=True)
class Watched:
    """A copy of a variant to be traced, and which of its models accept hooks.

    Args:
        variant: the copy to run.
        open: models whose modules may get hooks.
        compiled: models that run as compiled code, where hooks would not be called or would cause a recompilation.
    """

    variant: Variant
    open: tuple[PreTrainedModel, ...]
    compiled: tuple[PreTrainedModel, ...]


def watched(variant: Variant) -> Watched:
    """Copy a variant so that it can be traced. The original never gets hooks: a twin over its tensors replaces it."""
    from ..model.twins import fork
    from ..runtime.variant import Variant

    original = variant.original
    if not variant.transforms:
        twin = fork(original)
        return Watched(Variant(twin, variant.traffic, variant.workload), (twin,), ())
    copy = variant.copy()
    copy.speculation = None  # every traced token must be one step; tokens guessed right share a step
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
    """Profile a few requests, and return one prefill and one decode step that the host disturbed little.

    On a CPU, these are the fastest ones; on a GPU, `phases.on_device` chooses.

    Args:
        subject: the variant to run, from `watched`.
        ids: prompts, [B, P] int64.
        tokens: tokens to generate, at least two.
        requests: number of requests; with two, one is undisturbed on most hosts.

    Raises:
        MeasurementError: another torch profiler is running.
    """
    from ..runtime.dispatch import serving
    from ..runtime.steps.program import StepPrograms

    device = devices.of(ids.device)
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        raise MeasurementError("another torch profiler is running; stop it, then tune")
    served, shapes, turn = serving(subject.variant), matrices(subject.compiled), subject.variant.turn
    if device.asynchronous:
        with announced(subject.open):
            recording = read(device.trace(lambda: [time_request(served, ids, tokens, turn) for _ in range(requests)]))
        return on_device(recording, shapes)
    recorder = record(use_kineto=False, record_shapes=bool(shapes))
    step = subject.variant.step
    timed = step.timed() if isinstance(step, StepPrograms) else nullcontext()
    with announced(subject.open), silent_kineto(), timed, recorder as recorded:
        for _ in range(requests):
            time_request(served, ids, tokens, turn)
    program = step.program(len(ids)) if isinstance(step, StepPrograms) else None
    parts = instructions(program.times(), shapes) if program else ()
    events = [e for e in recorded.function_events if e.device_type.name == "CPU"]
    events.sort(key=lambda e: e.time_range.start)
    thread = next(e.thread for e in events if e.name == START)
    own = [e for e in events if e.thread == thread]
    prefills, steps = intervals((e.name, e.time_range.start) for e in own if e.name in (START, TICK))
    return {
        "prefill": _trace(own, min(prefills, key=length), shapes),
        "decode": unfolded(_trace(own, min(steps, key=length), shapes), parts),
    }


def instructions(spent: Sequence[tuple[Instruction, float]], shapes: Shapes) -> tuple[Span, ...]:
    """Turn a program's instructions and their times into spans of the operators they replace."""
    spans = list[Span]()
    for instruction, seconds in spent:
        role = PROGRAM_ROLES.get(instruction.code)
        group = PROGRAM_GROUPS.get(instruction.code, COMPILED)
        if instruction.matrix is not None:
            role, group = "linear", shapes.get(instruction.matrix) or COMPILED
        spans.append(Span(instruction.code, seconds, group, role, works=True, outermost=False))
    return tuple(spans)


def unfolded(trace: Trace, program: tuple[Span, ...]) -> Trace:
    """Replace the program's single operator in a trace by the program's instructions, which share its time."""
    whole = next((span for span in trace.spans if span.name == PROGRAM), None)
    total_s = sum(span.seconds for span in program)
    if whole is None or not total_s:
        return trace
    parts = [replace(span, seconds=span.seconds * whole.seconds / total_s) for span in program]
    parts[0] = replace(parts[0], outermost=True)  # the program is one call from Python
    return replace(trace, spans=(*(span for span in trace.spans if span is not whole), *parts))


@contextmanager
def announced(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """While active, make `models` and their parts open ranges in torch.profiler's trace, with their groups' names."""
    handles, opened = [], list[Any]()

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            opened.append(record_function(name).__enter__())  # type: ignore[no-untyped-call]

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    try:
        for model in models:
            parts = {name: RANGE + group for name, group in sections(model).items()}
            for name, shown in {"": FORWARD, **parts}.items():
                if twins.is_shared(module := model.get_submodule(name)):
                    continue  # live requests run this module, too
                handles.append(module.register_forward_pre_hook(enter(shown)))
                handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace(events: Sequence[Any], interval: Interval, shapes: Shapes) -> Trace:
    start, end = interval  # microseconds
    inside = [e for e in events if start <= e.time_range.start < end]
    spans = (span_of(e, shapes, e.self_cpu_time_total / 1e6) for e in inside if not DISPATCH.search(e.name))
    forwards = ((e.time_range.start, e.time_range.end) for e in inside if e.name == FORWARD)
    return Trace(mark_cache_writes(tuple(spans)), (end - start) / 1e6, loop_s=outside_forward(interval, forwards) / 1e6)
