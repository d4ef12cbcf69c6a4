"""What the GPU's device layer asks of torch.cuda, in which order, and on which device; torch.cuda is scripted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune.machine import peaks
from autotune.machine.device.cuda import Cuda
from tests.fakes.cuda import FakeCuda
from tests.fakes.lazy import Queue

SECOND = torch.device("cuda", 1)
OWN, CURRENT = "the device's own stream", "the current stream"
Log = list[Any]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Everything that is asked of torch.cuda, in order."""
    asked = Log()

    def enclosing(name: str) -> Callable[..., Any]:
        @contextmanager
        def context(*given: Any, **options: Any) -> Iterator[None]:
            asked.append((name, *given, *sorted(options.items())))
            yield
            asked.append(f"end of {name}")

        return context

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.timing = enable_timing

        def record(self, stream: object = CURRENT) -> None:
            asked.append(("record", stream))

        def synchronize(self) -> None:
            asked.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            assert self.timing
            assert end.timing
            return 250.0  # milliseconds

    class Host:
        def copy_(self, tensor: torch.Tensor, non_blocking: bool) -> None:
            asked.append(("copy", non_blocking))

    def current_stream(device: torch.device) -> Any:
        wait_event = lambda event: asked.append(("wait", device, event))  # noqa: E731
        return SimpleNamespace(device=device, wait_event=wait_event)

    def stream(*given: Any, **options: Any) -> str:
        asked.append(("Stream", *given, options))
        return OWN

    def empty(shape: Any, **options: Any) -> Host:
        asked.append(("empty", tuple(shape), options))
        return Host()

    replacements = {"device": enclosing("device"), "stream": enclosing("stream"), "graph": enclosing("graph")}
    replacements |= {"Event": Event, "Stream": stream, "CUDAGraph": lambda: "a graph", "current_stream": current_stream}
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch, "empty", empty)
    return asked


STREAM = ("Stream", SECOND, {"priority": -1})


def test_work_for_graphs_is_queued_on_one_stream_that_torch_hands_to_nobody_else(log: Log) -> None:
    """Streams of priority 0 are handed out in turn, 32 of them. Of any priority, a stream belongs to one device."""
    cuda = Cuda(SECOND)
    for _ in range(2):
        with cuda.stream():
            log.append("work")
    inside = [("device", SECOND), ("stream", OWN), "work", "end of stream", "end of device"]
    assert log == [("device", SECOND), STREAM, *inside[1:], *inside]


def test_a_graph_is_recorded_on_that_stream_and_other_threads_may_allocate(log: Log) -> None:
    graph, result = Cuda(SECOND).record_graph(lambda: log.append("work") or torch.ones(1), pool="a pool")
    recorded = ("graph", "a graph", ("capture_error_mode", "thread_local"), ("pool", "a pool"), ("stream", OWN))
    assert log == [STREAM, recorded, "work", "end of graph"]
    assert (graph, result.tolist()) == ("a graph", [1.0])


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_has_workspaces_of_its_own(log: Log, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries allocate theirs inside the capture, in the graph's memory, and again outside it after that."""
    drop = lambda: log.append("drop")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", drop, raising=False)  # a build for CPUs lacks it
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: log.append(("synchronize", where)))

    def work() -> torch.Tensor:
        log.append("work")
        return torch.ones(1) if not fails or log.count("work") <= 3 else torch.ones(1 // 0)

    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        Cuda(SECOND).capture(work, pool="a pool")
    started = log.index("drop")
    assert log[:started] == ["work", "work", "work", ("synchronize", SECOND)]
    assert [entry if isinstance(entry, str) else entry[0] for entry in log[started:]] == [
        "drop",
        "Stream",
        "graph",
        "work",
        *([] if fails else ["end of graph"]),
        "drop",
    ]


def test_a_mark_is_on_the_current_stream_of_the_device_and_waits_keep_the_host_going(log: Log) -> None:
    cuda = Cuda(SECOND)
    mark = cuda.mark()
    ((name, stream),) = log
    assert (name, stream.device) == ("record", SECOND)
    log.clear()
    cuda.wait(mark)
    assert log == [("wait", SECOND, mark)]


def test_a_tensor_is_fetched_through_memory_pinned_for_its_device(log: Log) -> None:
    """The mark comes after the copy, and the host waits for it only when it wants the numbers."""
    arrived = Cuda(SECOND).fetch(torch.ones(2, 3, dtype=torch.float16))
    pinned = {"dtype": torch.float16, "device": "cpu", "pin_memory": True}
    before, (name, stream) = log[:-1], log[-1]
    assert before == [("device", SECOND), ("empty", (2, 3), pinned), "end of device", ("copy", True)]
    assert (name, stream.device) == ("record", SECOND)
    log.clear()
    assert hasattr(arrived(), "copy_")
    assert log == ["synchronize"]


def test_a_fetched_tensor_is_garbage_until_its_copy_was_waited_for(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies run when somebody waits for them, and one does not wait for those that were queued later."""
    stream, pinned, copy = Queue(), list[torch.Tensor](), torch.Tensor.copy_

    class Event:
        def record(self, _: object) -> None:
            self.end = stream.last

        def synchronize(self) -> None:
            stream.run(self.end)

    def empty(shape: Any, dtype: torch.dtype, device: str, pin_memory: bool) -> torch.Tensor:
        pinned.append(torch.full(shape, torch.nan, dtype=dtype, device=device))
        return pinned[-1]

    def queued(to: torch.Tensor, given: torch.Tensor, non_blocking: bool) -> None:
        stream.put(lambda: copy(to, given), frozenset())

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "copy_", queued)
    arrived, later = (Cuda(SECOND).fetch(torch.full((2,), number)) for number in (1.0, 2.0))
    assert all(host.isnan().all() for host in pinned)
    assert arrived().tolist() == [1.0, 1.0]
    assert pinned[1].isnan().all()
    assert later().tolist() == [2.0, 2.0]


def test_work_is_timed_on_its_device_between_two_events(log: Log) -> None:
    assert Cuda(SECOND).seconds(lambda: log.append("work")) == 0.25
    timed = ["work", ("record", CURRENT), "end of device", "synchronize"]
    assert log == [("device", SECOND), ("record", CURRENT), *timed]


@pytest.mark.parametrize(("gpu", "readings"), [(True, ["sum", "copy", "sum", "copy"]), (False, [])])
def test_a_gpu_works_until_its_clocks_are_up(gpu: bool, readings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of 0.2 s while less than 0.3 s have passed, each reading in a turn of its own."""
    device, now, done = FakeCuda(), [5.0], list[str]()

    def seconds(work: Callable[[], Any]) -> float:
        now[0] += 0.1
        work()
        return 0.1

    @contextmanager
    def turn() -> Iterator[None]:
        done.append("turn")
        yield

    monkeypatch.setattr(device, "seconds", seconds)
    monkeypatch.setattr(device, "asynchronous", gpu)
    monkeypatch.setattr(peaks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    works: Any = [(8, lambda: done.append("sum")), (8, lambda: done.append("copy"))]
    peaks._raise_clocks(device, works, turn)
    assert done == [each for reading in readings for each in ("turn", reading)]
    assert peaks.CLOCKS_S == 0.3


def test_clocks_are_raised_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    order = list[str]()
    monkeypatch.setattr(peaks, "_raise_clocks", lambda *given: order.append("clocks"))
    monkeypatch.setattr(peaks, "_bandwidth", lambda *given: order.append("read") or 1.0)
    monkeypatch.setattr(peaks, "_peak", lambda *given: order.append("multiply") or (1.0, 256))
    peaks.measure(FakeCuda())
    assert order[:2] == ["clocks", "read"]
    assert order.count("clocks") == 1
