"""An NVIDIA GPU through torch.cuda: the only module that calls the driver."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from .base import Address, Device, Graph, Identity, Memory
from .cpu import SCRATCH_BYTES, trim_host
from .owner import GraphThread

SHARED_POOL = (0, 0)  # torch's name for the memory that is in no graph's pool
CACHES = 32  # scratch memory as a multiple of the L2 cache, which then holds 3 % of it at most


class Cuda(Device):
    kind, asynchronous = "cuda", True

    def identity(self) -> Identity:
        properties = torch.cuda.get_device_properties(self.where)
        return Identity(properties.name, f"{properties.major}.{properties.minor}", properties.total_memory)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.where)

    def seconds(self, work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.where):
            start.record()
            work()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def range(self, name: str) -> AbstractContextManager[None]:
        return torch.cuda.nvtx.range(name)

    def address(self) -> Address:
        found: Any = torch.cuda.get_device_properties(self.where)  # torch's stubs lack the PCI fields
        pci = f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        uuid = str(found.uuid)
        return Address(pci, uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")

    def scratch_bytes(self) -> int:
        cache = torch.cuda.get_device_properties(self.where).L2_cache_size
        return min(max(SCRATCH_BYTES, CACHES * cache), self.memory().free // 4)

    def memory(self) -> Memory:
        free, total = torch.cuda.mem_get_info(self.where)
        reserved = torch.cuda.memory_reserved(self.where)
        room = torch.cuda.get_per_process_memory_fraction(self.where) * total - reserved  # what torch may still take
        free = max(0, min(free, int(room))) + self._idle()
        return Memory(free, torch.cuda.memory_allocated(self.where), torch.cuda.max_memory_allocated(self.where))

    def _idle(self) -> int:
        """Bytes that torch has taken from the driver and uses for nothing."""
        if torch.cuda.get_allocator_backend() != "native":  # the driver's own (cudaMallocAsync) shows no segments
            return torch.cuda.memory_reserved(self.where) - torch.cuda.memory_allocated(self.where)
        segments = torch.cuda.memory_snapshot(include_traces=False)  # type: ignore[no-untyped-call]
        here = [s for s in segments if s["device"] == self.where.index and s["segment_pool_id"] == SHARED_POOL]
        return sum(s["total_size"] - s["allocated_size"] for s in here)  # in a graph's pool, it is the graph's

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.where)

    def release(self) -> None:
        trim_host()
        torch.cuda.empty_cache()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.where))
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.where).wait_event(mark)

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.where)

    @contextmanager
    def stream(self) -> Iterator[None]:
        with torch.cuda.device(self.where), torch.cuda.stream(self._stream):
            yield

    def random_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.where)

    def set_random_state(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        torch.set_rng_state(state[0])
        torch.cuda.set_rng_state(state[1], self.where)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        with torch.cuda.device(self.where):  # pinning on another GPU would open a context there
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = self.mark()

        def arrived() -> torch.Tensor:
            copied.synchronize()
            return host

        return arrived

    def record_graph(self, work: Callable[[], torch.Tensor], pool: Any) -> tuple[Graph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may serve requests and allocate meanwhile, on their own streams
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph, result

    def drop_workspaces(self) -> None:
        torch._C._cuda_clearCublasWorkspaces()

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @functools.cached_property
    def owner(self) -> GraphThread:
        return GraphThread(self)

    def without_graphs(self) -> str | None:
        return None

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        # of high priority, because torch hands out its 32 normal streams in turn: others would queue into this one, too
        return torch.cuda.Stream(self.where, priority=-1)  # type: ignore[no-untyped-call]
