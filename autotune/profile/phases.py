"""Which part of traced requests is prefill and which a decode step, and what a GPU did in each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..errors import MeasurementError
from ..workload import Phase
from .recording import OPERATOR, Recording
from .spans import DISPATCH, GENERATED, Shapes, Span, Trace, kernel_span, mark_cache_writes, span_of
from .timeline import Interval, seconds_by_caller, timeline, within
from .timing import START, TICK


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


def length(interval: Interval) -> float:
    """How long an interval is."""
    return interval[1] - interval[0]


def on_device(recording: Recording, shapes: Shapes) -> dict[Phase, Trace]:
    """The fastest prefill and the median decode step of a recording.

    The median, as a loop that runs ahead of the device hands out tokens unevenly: two may arrive close together.

    Raises:
        MeasurementError: no request is in it, or nothing of the device.
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
    """What ran on the device in the interval, whenever it was launched, and what was called in it and launched nothing.

    A loop that runs ahead launches the next step's kernels before this one's have ended: each takes its time where it
    runs, and an operator counts where it is called.
    """
    start, end = interval
    found = timeline(recording, interval)
    seconds, spans = seconds_by_caller(recording, interval), list[tuple[float, Span]]()
    for call in recording.calls:
        called, works = start <= call.start_s < end, call in seconds and not GENERATED.search(call.name)
        if call.category == OPERATOR and (called or works) and not DISPATCH.search(call.name):
            span = span_of(call, shapes, seconds[call] if works else 0.0)
            spans.append((call.start_s, replace(span, works=works, outermost=span.outermost and called)))
    for work in recording.work:  # what no operator, or a whole compiled graph, launched is known by its own name
        alone = work.operator is None or GENERATED.search(work.operator.name)
        if alone and (spent := within(work, start, end)):
            spans.append((work.start_s, kernel_span(work, spent)))
    spans.sort(key=lambda each: each[0])
    return Trace(mark_cache_writes(tuple(span for _, span in spans)), end - start, found.sync_s, found)
