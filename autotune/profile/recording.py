"""Read the Chrome trace of torch's profiler: the host's calls and the device's work.

The schema is public: complete events ("ph": "X") with a category, microseconds, and arguments. A device event refers to
the host's call that launched it by a correlation number, which all kernels of one graph launch share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import MeasurementError

OPERATOR, ANNOTATION = "cpu_op", "user_annotation"
RUNTIME = frozenset({"cuda_runtime", "cuda_driver"})
HOST = RUNTIME | {OPERATOR, ANNOTATION}
DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})  # without gpu_user_annotation: a range does no work


@dataclass(frozen=True, eq=False)
class HostCall:
    """A call on the host: an operator, an annotated range, or a call to the driver.

    Args:
        name: as the profiler writes it ("aten::mm", "cudaLaunchKernel").
        category: the trace's category ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver").
        start_s, end_s: seconds since the recording began.
        thread: the thread it ran on.
        parent: the call that contains it, on the same thread.
        input_shapes: shapes of an operator's arguments; empty for scalars.
    """

    name: str
    category: str
    start_s: float
    end_s: float
    thread: Any = None
    parent: HostCall | None = None
    input_shapes: tuple[Any, ...] = ()

    @property
    def operator(self) -> HostCall | None:
        """The nearest operator: this call or one of its callers."""
        call: HostCall | None = self
        while call is not None and call.category != OPERATOR:
            call = call.parent
        return call


@dataclass(frozen=True, eq=False)
class DeviceEvent:
    """Work on the device: a kernel, a copy, or a memory set.

    Args:
        name: of the kernel, or "Memcpy HtoD (Pageable -> Device)".
        category: "kernel", "gpu_memcpy" or "gpu_memset".
        start_s, end_s: seconds since the recording began.
        launch: the host's call that started it; None if the trace does not contain it.
        operator: the operator that it is part of; None if unknown.
        correlation: number of its launch; kernels of one graph share it.
        size_bytes: bytes of a copy or a memory set.
        occupancy: estimated share of the warps that fit, 0 to 1.
    """

    name: str
    category: str
    start_s: float
    end_s: float
    launch: HostCall | None = None
    operator: HostCall | None = None
    correlation: int | None = None
    size_bytes: int = 0
    occupancy: float | None = None

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Recording:
    """A trace: the host's calls and the device's work, each in order of their start."""

    calls: tuple[HostCall, ...] = ()
    work: tuple[DeviceEvent, ...] = ()


@dataclass(frozen=True, eq=False)
class _Event:
    name: str
    category: str
    start_s: float
    end_s: float
    thread: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def number(self, *names: str) -> int | None:
        """Return the first of these arguments that is a number other than 0; as an id or a size, 0 means "none"."""
        return next((int(v) for n in names if isinstance(v := self.arguments.get(n), int | float) and v), None)

    @property
    def occupancy(self) -> float | None:
        """Estimated share of the warps that fit, 0 to 1; None if unknown (the profiler writes -99 %)."""
        found = self.arguments.get("est. achieved occupancy %")
        return found / 100 if isinstance(found, int | float) and found >= 0 else None


def read(text: str | bytes) -> Recording:
    """Parse a recording from a Chrome trace.

    Raises:
        MeasurementError: the text is not such a trace, or ends in the middle.
    """
    try:
        document = json.loads(text, parse_constant=lambda name: None)  # NaN and infinity are not valid values
    except (ValueError, RecursionError) as error:
        raise MeasurementError(
            f"the profiler's trace cannot be read ({error}); was the disk it was written to full?"
        ) from error
    events = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(events, list):
        raise MeasurementError("the profiler's trace has no list of events (traceEvents)")
    complete = [event for event in events if _is_complete(event)]
    zero = min((event["ts"] for event in complete), default=0.0)  # timestamps are large; the difference keeps precision
    found = [_event(event, zero) for event in complete]
    calls = _nested([event for event in found if event.category in HOST])
    return Recording(tuple(calls.values()), _work([event for event in found if event.category in DEVICE], calls))


def _is_complete(event: Any) -> bool:
    if not isinstance(event, dict) or event.get("ph") != "X" or event.get("cat") not in HOST | DEVICE:
        return False
    times = event.get("ts"), event.get("dur")
    return all(isinstance(time, int | float) and math.isfinite(time) for time in times) and event["dur"] >= 0


def _event(event: Mapping[str, Any], zero: float) -> _Event:
    start_s = (event["ts"] - zero) / 1e6
    arguments = event.get("args")
    return _Event(
        str(event.get("name", "")),
        event["cat"],
        start_s,
        start_s + event["dur"] / 1e6,
        (event.get("pid"), event.get("tid")),
        arguments if isinstance(arguments, dict) else {},
    )


def _nested(events: Sequence[_Event]) -> dict[_Event, HostCall]:
    """Turn host events into calls with their callers, in order of their start. On one thread, ranges nest."""
    calls, stacks = dict[_Event, HostCall](), dict[Any, list[HostCall]]()
    for event in sorted(events, key=lambda e: (e.start_s, -e.end_s)):
        stack = stacks.setdefault(event.thread, [])
        while stack and stack[-1].end_s <= event.start_s:
            stack.pop()
        calls[event] = HostCall(
            event.name,
            event.category,
            event.start_s,
            event.end_s,
            event.thread,
            stack[-1] if stack else None,
            _shapes(event.arguments.get("Input Dims")),
        )
        stack.append(calls[event])
    return calls


def _work(events: Sequence[_Event], calls: Mapping[_Event, HostCall]) -> tuple[DeviceEvent, ...]:
    """Join device events with their launch by correlation number, else only with their operator by its external id."""
    launches, operators = dict[int, HostCall](), dict[int, HostCall]()
    for event, call in calls.items():
        if event.category in RUNTIME and (correlation := event.number("correlation")) is not None:
            launches[correlation] = call
        elif event.category == OPERATOR and (external := event.number("External id", "external id")) is not None:
            operators[external] = call
    found = []
    for event in sorted(events, key=lambda e: e.start_s):
        correlation, external = event.number("correlation"), event.number("External id", "external id")
        launch = launches.get(correlation) if correlation is not None else None
        operator = launch.operator if launch is not None else operators.get(external) if external is not None else None
        found.append(
            DeviceEvent(
                event.name,
                event.category,
                event.start_s,
                event.end_s,
                launch,
                operator,
                correlation,
                event.number("bytes") or 0,
                event.occupancy,
            )
        )
    return tuple(found)


def _shapes(dimensions: Any) -> tuple[Any, ...]:
    """Return the shapes as the profiler writes them; a list of tensors among the arguments is nested once more."""
    return tuple(each for each in dimensions if isinstance(each, list)) if isinstance(dimensions, list) else ()
