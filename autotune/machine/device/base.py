"""What a CPU and a GPU have in common, and what each has to say for itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from ...errors import DeviceError, first_line
from .failures import Failure, classify
from .owner import GraphThread
from .trace import record

Kind = Literal["cpu", "cuda"]


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
    """Where a GPU is found by other libraries, which number devices in another order than torch does.

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
        free: what can still be had, blocks that torch keeps for reuse included.
        used: held by this process's tensors; of the whole process on a CPU.
        peak: the highest `used` since `reset_peak`; of the process's whole life on a CPU.
    """

    free: int
    used: int
    peak: int


class Graph(Protocol):
    """Captured work: `replay` queues all of it again, on the very buffers it was captured with."""

    def replay(self) -> None: ...


class Device(ABC):
    """One CPU or GPU.

    Attributes:
        kind: "cpu" or "cuda".
        asynchronous: whether the host's calls only queue work.
        where: torch's name for it.
    """

    kind: ClassVar[Kind]
    asynchronous: ClassVar[bool]

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self._dead: str | None = None

    @abstractmethod
    def identity(self) -> Identity: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything queued has run."""

    @abstractmethod
    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes on the device, from the first operator's start to the last one's end."""

    def trace(self, work: Callable[[], object]) -> bytes:
        """`work` under torch's profiler: its Chrome trace, JSON.

        Raises:
            MeasurementError: the trace could not be written.
        """
        return record(work, self.where, self.synchronize)

    def range(self, name: str) -> AbstractContextManager[None]:
        """Within it, what this thread queues bears `name` in the vendor's tools."""
        return nullcontext()

    def address(self) -> Address | None:
        """Where other libraries find the device; None for a CPU."""
        return None

    @abstractmethod
    def scratch_bytes(self) -> int:
        """Memory that measuring may take for a moment: so much that the device's caches do not answer for it."""

    @abstractmethod
    def memory(self) -> Memory: ...

    @abstractmethod
    def reset_peak(self) -> None:
        """Start measuring `Memory.peak` anew, where the system can."""

    @abstractmethod
    def trim(self) -> None:
        """Give back memory that is kept for reuse."""

    @abstractmethod
    def mark(self) -> Any:
        """A point in what this thread has queued so far, for `wait`."""

    @abstractmethod
    def wait(self, mark: Any) -> None:
        """What this thread queues from here on runs after everything before `mark`. The host does not wait."""

    @abstractmethod
    def stream(self) -> AbstractContextManager[None]:
        """Within it this thread queues into a stream of its own, the one that graphs are captured and replayed on."""

    def random_state(self) -> Any:
        """The state of the generators that sampling on this device draws from, for `set_random_state`."""
        return torch.get_rng_state()

    def set_random_state(self, state: Any) -> None:
        torch.set_rng_state(state)

    @abstractmethod
    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start copying a tensor to the host; the function returned waits for the copy and nothing queued later."""

    @abstractmethod
    def capture(self, work: Callable[[], torch.Tensor], pool: Any = None) -> tuple[Graph, torch.Tensor]:
        """Run `work` a few times, then record what it queues. For the owner thread, inside `stream`.

        Args:
            work: reads and writes buffers that stay where they are as long as the graph lives; never waits.
            pool: what `pool` returned, to share memory with other graphs that never run at the same time.

        Returns:
            The graph, and the tensor that each replay writes its result into.

        Raises:
            DeviceError: this device has no graphs.
        """

    @abstractmethod
    def pool(self) -> Any:
        """Memory for graphs that never run at the same time."""

    @property
    @abstractmethod
    def owner(self) -> GraphThread:
        """The one thread that captures and replays this device's graphs."""

    def without_graphs(self) -> str | None:
        """Why nothing can be captured here, or None."""
        return f"{self.kind} devices have no graphs to capture"

    def failure(self, error: BaseException) -> Failure | None:
        """What an error says about the device: out of memory, dead for this process, or nothing."""
        return classify(error)

    def mark_dead(self, error: BaseException) -> DeviceError:
        """Note that the device is dead for this process; returns the one exception that says so, from now on."""
        if self._dead is None:
            self._dead = (
                f"{self.where} failed for good in this process ({first_line(error)}); its memory cannot be read any "
                "more and nothing is retried: restart the process"
            )
        return DeviceError(self._dead)

    def check(self) -> None:
        """Raises DeviceError when the device is dead."""
        if self._dead is not None:
            raise DeviceError(self._dead)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around work on the device: an error that means that it is dead becomes the one exception that says so.

        Raises:
            DeviceError: it is dead, or was before; nothing is tried on it then.
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
