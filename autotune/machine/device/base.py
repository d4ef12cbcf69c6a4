"""The interface of a device: what a CPU and a GPU share, and what each must implement."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from ...errors import DeviceError, first_line
from .. import forking
from .failures import Failure, classify
from .owner import GraphThread
from .trace import record

Kind = Literal["cpu", "cuda"]

# Held while a graph is recorded or memory is released, on any device: torch.cuda.empty_cache releases that of all, and
# the allocator allows it in no capture. Reentrant: work that releases memory while it is captured gets torch's error.
_recording = forking.free(threading.RLock())
WARM_UPS = 3  # runs before a capture: libraries initialise in the first run, and must not during the capture


@dataclass(frozen=True)
class Identity:
    """What a device is.

    Args:
        name: processor or GPU name.
        capability: instruction set ("AVX512", "AVX2", "NEON") or compute capability ("9.0").
        memory_bytes: memory in total.
    """

    name: str
    capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Address:
    """A GPU's address for other libraries, which number devices in another order than torch.

    Args:
        pci: PCI address, "00000000:65:00.0".
        uuid: "GPU-..." or "MIG-...".
    """

    pci: str
    uuid: str


@dataclass(frozen=True)
class Memory:
    """A device's memory as this process sees it, bytes.

    Args:
        free: memory that can still be allocated, including blocks that torch keeps for reuse, without those of graphs.
        used: memory of this process's tensors; on a CPU, of the whole process.
        peak: the highest `used` since `reset_peak`; on a CPU, since the process started.
    """

    free: int
    used: int
    peak: int


class Graph(Protocol):
    """Captured work: `replay` queues all of it again, on the same buffers as in the capture."""

    def replay(self) -> None: ...


class Device(ABC):
    """One CPU or GPU.

    Attributes:
        kind: "cpu" or "cuda".
        asynchronous: whether the host's calls only queue work.
        where: torch's name for it.
        queueing: held by the one thread that is inside `stream`. A capture records whatever is queued there meanwhile,
            and a graph's buffers are written, replayed and read in one piece.
    """

    kind: ClassVar[Kind]
    asynchronous: ClassVar[bool]

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self.queueing = forking.free(threading.RLock())
        self._dead: str | None = None

    @property
    def is_host(self) -> bool:
        """Whether its memory is the host's, which reads it without waiting."""
        return self.where.type == "cpu" and not self.asynchronous

    @abstractmethod
    def identity(self) -> Identity: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything queued has run."""

    @abstractmethod
    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes on the device, from the first operator's start to the last one's end."""

    def trace(self, work: Callable[[], object]) -> bytes:
        """Run `work` under torch's profiler; returns its Chrome trace, JSON.

        Raises:
            MeasurementError: the trace could not be written.
        """
        return record(work, self.where, self.synchronize)

    def range(self, name: str) -> AbstractContextManager[None]:
        """Inside the block, label what this thread queues with `name` for the vendor's tools."""
        return nullcontext()

    def address(self) -> Address | None:
        """The device's address for other libraries; None for a CPU."""
        return None

    @abstractmethod
    def scratch_bytes(self) -> int:
        """Memory that a measurement may take for a short time: more than the device's caches hold, if possible."""

    @abstractmethod
    def memory(self) -> Memory: ...

    @abstractmethod
    def reset_peak(self) -> None:
        """Restart `Memory.peak`, if the system supports it."""

    def trim(self) -> None:
        """Release memory that is kept for reuse. A capture on another thread, which allocates, is awaited first."""
        with self.unrecorded():
            self.release()

    def unrecorded(self) -> AbstractContextManager[object]:
        """Inside the block no other thread records a graph, on any device: for code that releases memory by itself."""
        return _recording

    @abstractmethod
    def release(self) -> None:
        """Do what `trim` promises, while nothing is captured."""

    @abstractmethod
    def mark(self) -> Any:
        """Mark the end of what this thread has queued so far, for `wait`."""

    @abstractmethod
    def wait(self, mark: Any) -> None:
        """Make what this thread queues from now on run after everything before `mark`. The host does not wait."""

    def current(self) -> AbstractContextManager[object]:
        """Inside the block, what this thread does without naming a device is done on this one."""
        return nullcontext()

    @abstractmethod
    def stream(self) -> AbstractContextManager[None]:
        """Inside the block, queue this thread's work into the stream on which graphs are captured and replayed.

        The caller holds `queueing`.
        """

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside the block, replay graphs from this thread, and read and write their buffers.

        All of it runs after what this thread queued before, and ahead of what it queues later. Tensors used besides the
        graphs' must belong to this thread's stream: their memory is then freed in its order.

        Raises:
            DeviceError: the device is dead.
        """
        self.check()
        with self.queueing, ExitStack() as ends:
            before = self.mark()
            with self.stream():
                self.wait(before)
                try:
                    yield
                finally:  # after an error, too: what was queued before it reads the caller's memory
                    ends.callback(self.wait, self.mark())

    def random_state(self) -> Any:
        """The state of the generators that sampling on this device draws from, for `set_random_state`."""
        return torch.get_rng_state()

    def set_random_state(self, state: Any) -> None:
        torch.set_rng_state(state)

    @abstractmethod
    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start copying a tensor to the host. The returned function waits for the copy, but not for later work."""

    def capture(self, work: Callable[[], torch.Tensor], pool: Any = None) -> tuple[Graph, torch.Tensor]:
        """Run `work` a few times, then record what it queues. Call this on the owner thread, inside `stream`.

        A graph keeps the address of the workspace that libraries wrote to during its capture. The end of any graph
        frees the workspaces of its stream (pytorch#193402), so each graph must have one of its own, in its own memory.

        Args:
            work: reads and writes buffers whose addresses do not change while the graph exists; never waits.
            pool: what `pool` returned, to share memory with other graphs that never run at the same time.

        Returns:
            The graph, and the tensor that each replay writes its result into.

        Raises:
            DeviceError: this device has no graphs.
        """
        for _ in range(WARM_UPS):
            work()
        self.synchronize()
        self.drop_workspaces()  # the capture allocates them anew, in the graph's memory
        try:
            with _recording:
                return self.record_graph(work, pool)
        finally:
            self.drop_workspaces()  # nothing else may write into the graph's memory

    @abstractmethod
    def record_graph(self, work: Callable[[], torch.Tensor], pool: Any) -> tuple[Graph, torch.Tensor]:
        """Record what `work` queues, and nothing else; see `capture`."""

    @abstractmethod
    def drop_workspaces(self) -> None:
        """Let libraries allocate their workspaces anew when they next need them."""

    @abstractmethod
    def pool(self) -> Any:
        """Memory for graphs that never run at the same time."""

    @property
    @abstractmethod
    def owner(self) -> GraphThread:
        """The one thread that captures this device's graphs, and runs those that inductor captures."""

    def without_graphs(self) -> str | None:
        """Why nothing can be captured here, or None."""
        return f"{self.kind} devices have no graphs to capture"

    def failure(self, error: BaseException) -> Failure | None:
        """What an error says about the device: out of memory, dead for this process, or nothing."""
        return classify(error)

    def mark_dead(self, error: BaseException) -> DeviceError:
        """Record that the device is dead for this process. Returns the exception that every later use raises."""
        if self._dead is None:
            self._dead = (
                f"{self.where} failed and cannot be used again in this process ({first_line(error)}): its memory can "
                "no longer be read; restart the process"
            )
        return DeviceError(self._dead)

    def check(self) -> None:
        """Raise DeviceError if the device is dead."""
        if self._dead is not None:
            raise DeviceError(self._dead)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Guard work on the device: an error that means that the device is dead becomes a DeviceError.

        Raises:
            DeviceError: the device died, or was already dead; in that case the work does not run.
        """
        self.check()
        try:
            yield
        except DeviceError:
            raise
        except Exception as error:
            if self.failure(error) == "dead":
                raise self.mark_dead(error) from error
            raise
