"""A CUDA device that is not there: tensors stay on the CPU, queueing, streams and graphs behave as the driver's do.

    with device.stand_in(FakeCuda()) as fake: ...

The rules and their sources are two tables, `rules.RULES` and `refusals.REFUSALS`. Tests break each of them, and switch
it off (`FakeCuda(without=...)`) to see that nothing else notices.

What the caller queues into its own stream runs at once. The device's own stream runs as late as it may: when somebody
waits for it, or when an operator inside it needs what was queued. Operators are refused inside that stream, where steps
are warmed up, captured and replayed, and in `with fake.kernels():`. What is compiled is `opaque`, neither queued nor
refused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.machine.device import Address, Device, Graph, Identity, Memory
from autotune.machine.device.owner import GraphThread
from autotune.machine.device.trace import record
from tests.fakes import traces
from tests.fakes.graphs import Pool, Recorded, Replayed, Workspace
from tests.fakes.lazy import Queue, addresses, inside, spoil
from tests.fakes.rules import Misuse

OPERATOR_S = 5e-6  # what each operator takes on the fake clock


class FakeCuda(Device):
    """One GPU made of CPU tensors.

    Args:
        identity: what it pretends to be.
        free_bytes: memory that is still to be had.
        opaque: replay by running the captured Python again, for compiled code, whose kernels cannot be recorded. The
            rules about threads, streams and results hold all the same.
        without: names of rules that do not hold.

    Attributes:
        waits: how often the host waited for the device.
        captures, replays: how many there were.
        lost_bytes: memory that failed captures keep; no longer in `free_bytes`.
        trims: how often memory kept for reuse was given back.
        ranges: names that work bore, in order.
    """

    kind, asynchronous = "cuda", True

    H100: ClassVar[Identity] = Identity("NVIDIA H100 80GB HBM3", "9.0", 80 * 2**30)

    def __init__(
        self,
        identity: Identity = H100,
        free_bytes: int | None = None,
        opaque: bool = False,
        without: Collection[str] = (),
    ) -> None:
        super().__init__(torch.device("cpu"))
        self._identity = identity
        self.opaque = opaque
        self.without = frozenset(without)
        self.free_bytes = identity.memory_bytes if free_bytes is None else free_bytes
        self.waits = self.captures = self.replays = self.trims = 0
        self.ranges = list[str]()
        self._owner = GraphThread(self)
        self._local = threading.local()
        self._inside: int | None = None  # identifier of the thread that queues into the device's stream
        self._marks = 0
        self.is_recording = False
        self._at_once = False
        self.lost_bytes = 0
        self._workspace: Workspace | None = None
        self._queue = Queue()
        self.loaded = set[Any]()  # operators that ran before a capture

    @property
    def capability(self) -> tuple[int, int]:
        major, minor = map(int, self._identity.capability.split("."))
        return major, minor

    def keeps(self, rule: str) -> bool:
        """Whether a rule holds. While the device's time is measured or traced, work runs where it is queued."""
        return rule not in self.without and not (rule == "lazy" and self._at_once)

    def punish(self, rule: str, message: str) -> None:
        if self.keeps(rule):
            raise Misuse(message)

    def identity(self) -> Identity:
        return self._identity

    def synchronize(self) -> None:
        self.forbid_waiting("synchronize")
        self.waits += 1
        self._queue.run()

    def trace(self, work: Callable[[], object]) -> bytes:
        everywhere = _ExperimentalConfig(profile_all_threads=True)  # the owner's, too, whose graphs a GPU reports
        with self._measured():
            return traces.with_device(record(work, self.where, self.synchronize, experimental_config=everywhere))

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        self.ranges.append(name)
        yield

    def address(self) -> Address:
        return Address("00000000:65:00.0", "GPU-00000000-1111-2222-3333-444444444444")

    def scratch_bytes(self) -> int:
        return 2**20  # it is the CPU that works

    def seconds(self, work: Callable[[], object]) -> float:
        with self._measured(), _Counting() as counted:
            work()
        return max(1, counted.operators) * OPERATOR_S

    @contextmanager
    def _measured(self) -> Iterator[None]:
        self._queue.run()
        before, self._at_once = self._at_once, True
        try:
            yield
        finally:
            self._at_once = before

    def memory(self) -> Memory:
        return Memory(self.free_bytes, self._identity.memory_bytes - self.free_bytes, self._identity.memory_bytes)

    def reset_peak(self) -> None: ...

    def release(self) -> None:
        if self.is_recording:
            self.punish("release", "memory released while a graph is captured")
        self.trims += 1

    def mark(self) -> _Mark:
        self._require_seen()
        self._marks += 1
        return _Mark(self._marks, self._is_inside, self._queue.last)

    def wait(self, mark: _Mark) -> None:
        if mark.number > self._marks:
            raise Misuse("waits for a mark that was never made")
        if self._is_inside:
            self._local.ordered |= not mark.inside
        elif mark.inside:
            if mark.number > getattr(self._local, "unseen", 0):
                self._local.unseen = 0
            self._queue.run(mark.queued)  # what the caller queues next runs at once

    @contextmanager
    def stream(self) -> Iterator[None]:
        before = self._inside
        if before not in (None, threading.get_ident()):
            self.punish("stream", "two threads queue into the device's stream at once")
        self._inside = threading.get_ident()
        if before is None:
            self._local.ordered = False
        try:
            with inside(self, self._queue):
                yield
        finally:
            self._inside = before

    @property
    def _is_inside(self) -> bool:
        return self._inside == threading.get_ident()

    def replayed(self) -> None:
        """A graph is queued now, into the stream that this thread is in."""
        self.require_stream("replay")
        if not self._local.ordered:
            self.punish("before", "replayed without a wait for what the caller queued before")
        self._local.unseen = self._marks  # until a wait for a later mark
        self.replays += 1

    def _require_seen(self) -> None:
        if not self._is_inside and getattr(self._local, "unseen", 0):
            self.punish("after", "goes on without a wait for what was replayed")

    def queued(self, work: Callable[[], object], touched: frozenset[int]) -> None:
        """Queue work into the device's stream; `touched`: addresses of the memory that it reads and writes."""
        self._queue.put(work, touched)
        if not self.keeps("lazy"):
            self._queue.run()

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.forbid_waiting("copy to the host")
        self._require_seen()
        host = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        given = tensor if self._is_inside else tensor.clone()  # the caller's own work ran, and may go on
        ready = Queue() if not self._is_inside else self._queue
        number = ready.put(lambda: host.copy_(given), addresses((host, given)))
        if self.keeps("fetch"):
            spoil(host)
        else:
            ready.run(number)

        def arrived() -> torch.Tensor:
            self.waits += 1
            ready.run(number)
            return host

        arrived.host = host  # type: ignore[attr-defined]  # what may not be read yet
        return arrived

    def capture(self, work: Callable[[], torch.Tensor], pool: Any = None) -> tuple[Graph, torch.Tensor]:
        self.require_stream("capture")
        self._workspace = self._workspace or Workspace()  # the warm-ups take it
        return super().capture(work if self.opaque else self._loading(work), pool)

    def _loading(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with nullcontext() if self.is_recording else _Loading(self.loaded):
                return work()

        return run

    def record_graph(self, work: Callable[[], torch.Tensor], pool: Any) -> tuple[Graph, torch.Tensor]:
        self.captures += 1
        graph = Recorded(self) if self.keeps("operators") and not self.opaque else Replayed(self, work)
        graph.pool = pool or self.pool()
        graph.workspace = self._workspace or Workspace()  # in the graph's own memory, if there was none
        weakref.finalize(graph, self._graph_ended)
        result = graph.record(work)
        return graph, result

    def drop_workspaces(self) -> None:
        self._workspace = None

    def _graph_ended(self) -> None:
        if self._workspace is not None:
            self._workspace.freed = True
        self._workspace = None

    def pool(self) -> Pool:
        return Pool(self)

    def kernels(self) -> AbstractContextManager[None]:
        """Inside the block, this thread's operators are refused as a GPU's kernels refuse them."""
        return inside(self, None)

    @property
    def owner(self) -> GraphThread:
        return self._owner

    def without_graphs(self) -> str | None:
        return None

    def require_stream(self, what: str) -> None:
        if not self._is_inside:
            self.punish("stream", f"{what} outside the device's stream")

    def forbid_waiting(self, what: str) -> None:
        if getattr(self._local, "capturing", False):
            self.punish("synchronize", f"{what} while a graph is captured")

    @contextmanager
    def capturing(self) -> Iterator[None]:
        if getattr(self._local, "capturing", False):
            raise Misuse("a capture inside a capture")
        self._local.capturing = self.is_recording = True
        try:
            yield
        finally:
            self._local.capturing = self.is_recording = False


class _Mark(NamedTuple):
    """The end of what was queued when it was made; `inside`: into the device's stream, whose last work is `queued`."""

    number: int
    inside: bool
    queued: int


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


class _Loading(TorchDispatchMode):
    def __init__(self, loaded: set[Any]) -> None:
        super().__init__()
        self.loaded = loaded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.loaded.add(func)
        return func(*args, **(kwargs or {}))
