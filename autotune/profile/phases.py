"""Split traced requests into prefill and decode steps, and find what a GPU did in each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..errors import MeasurementError
from ..workload import Phase
from .recording import OPERATOR, Recording
from .spans import (
    DISPATCH,
    FORWARD,
    GENERATED,
    Shapes,
    Span,
    Trace,
    kernel_span,
    mark_cache_writes,
    outside_forward,
    span_of,
)
from .timeline import Interval, seconds_by_caller, timeline, within
from .timing import START, TICK


def intervals(marks: Iterable[tuple[str, float]]) -> tuple[list[Interval], list[Interval]]:
    """Return the intervals of prefills (start to first token) and of decode steps (token to token).

    Args:
        marks: the names START and TICK with their times, in order.
    """
    prefills, steps, ticks = list[Interval](), list[Interval](), list[float]()
    for name, at in marks:
        ticks = [at] if name == START else [*ticks, at]
        if len(ticks) == 3:  # start, prompt, first token
            prefills.append((ticks[0], ticks[2]))
        elif len(ticks) > 3:
            steps.append((ticks[-2], ticks[-1]))
    return prefills, steps


def length(interval: Interval) -> float:
    """Return the length of an interval."""
    return interval[1] - interval[0]


def on_device(recording: Recording, shapes: Shapes) -> dict[Phase, Trace]:
    """Return the fastest prefill and the median decode step of a recording.

    The fastest decode step would mislead: if the loop runs ahead of the device, two tokens may arrive close together.

    Raises:
        MeasurementError: the recording has no whole request, or no work of the device.
    """
    if not recording.work:
        raise MeasurementError(
            "the profiler saw nothing of the GPU: another tool (nsys, ncu, DCGM) may hold its counters; stop that tool"
        )
    marks = [(call.name, call.start_s) for call in recording.calls if call.name in (START, TICK)]
    prefills, steps = intervals(marks)
    if not prefills or not steps:
        raise MeasurementError("the profiler's trace has no whole request in it; free memory for its buffers")
    return {
        "prefill": _device_trace(recording, min(prefills, key=length), shapes),
        "decode": _device_trace(recording, sorted(steps, key=length)[len(steps) // 2], shapes),
    }


def _device_trace(recording: Recording, interval: Interval, shapes: Shapes) -> Trace:
    """Return the trace of an interval: work that ran on the device in it, and operators that were called in it.

    If the loop runs ahead, it launches the next step's kernels before this step's have ended. Therefore a kernel's time
    counts in the interval in which it runs, and an operator's call in the interval in which it is called.
    """
    start, end = interval
    found = timeline(recording, interval)
    seconds, spans = seconds_by_caller(recording, interval), list[tuple[float, Span]]()
    for call in recording.calls:
        called, works = start <= call.start_s < end, call in seconds and not GENERATED.search(call.name)
        if call.category == OPERATOR and (called or works) and not DISPATCH.search(call.name):
            span = span_of(call, shapes, seconds[call] if works else 0.0)
            spans.append((call.start_s, replace(span, works=works, outermost=span.outermost and called)))
    for work in recording.work:  # work launched by no operator or by a compiled graph gets the kernel's name
        alone = work.operator is None or GENERATED.search(work.operator.name)
        if alone and (spent := within(work, start, end)):
            spans.append((work.start_s, kernel_span(work, spent)))
    spans.sort(key=lambda each: each[0])
    forwards = ((call.start_s, call.end_s) for call in recording.calls if call.name == FORWARD)
    loop_s = outside_forward(interval, forwards)
    return Trace(mark_cache_writes(tuple(span for _, span in spans)), end - start, found.sync_s, found, loop_s)
