"""A CUDA device that is not there: tensors stay on the CPU, queueing, streams and graphs behave as the driver's do.

    with device.stand_in(FakeCuda()) as fake: ...

What it reproduces are the rules that code for GPUs breaks first. Breaking one raises `Misuse` where a real device
would give wrong numbers, crash later, or work until it is busy, and torch's own error where torch has one.

rule                                                                            source
------------------------------------------------------------------------------  --------------------------------------
a graph replays operators, not Python: what the host decided is frozen           CUDA programming guide, graphs
it reads and writes the buffers it was captured with: none is freed or resized   torch.cuda.CUDAGraph
the result of a replay is in one buffer, overwritten by the next                 torch.cuda.CUDAGraph
capture and replay happen inside the device's own stream, into which one thread  CUDA driver API, graphs are not
  queues at a time; a replay may come from any thread                             thread-safe; torch.cuda.CUDAGraph
a replay waits for what the caller queued before, and what the caller queues     CUDA programming guide, streams
  next waits for it (mark, wait)
nothing may wait during a capture, nor copy between host and device:             cudaErrorStreamCaptureUnsupported
  synchronize, fetch, .item(), .cpu(), .tolist(), .numpy(), torch.tensor(device=)
no thread releases memory during a capture                                       CUDACachingAllocator, empty_cache
libraries keep one workspace for a stream; a capture uses it unless it was       pytorch#193402
  dropped, and the end of any graph frees it
graphs of one pool share its memory, which ends with the last of them            torch.cuda.graph_pool_handle
a failed capture keeps its memory as long as the process lives                   pytorch#190308 (torch before 2.14)
a capture may run out of memory                                                  CUDACachingAllocator
flash attention takes no mask and no FP32                                        ATen, sdp_utils.cpp
_int_mm takes more than 16 rows                                                  ATen, _int_mm_out_cuda

`fetch` needs no rule: its tensor comes from the wait for it, so that it cannot be read too early. Operators are refused
inside the device's stream, where steps are warmed up, captured and replayed, and in `with fake.kernels():`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from autotune.machine.device import Address, Device, Graph, Identity, Memory
from autotune.machine.device.owner import GraphThread
from autotune.machine.device.trace import record
from autotune.runtime.steps.waiting import WAITS
from tests.fakes import traces

OPERATOR_S = 5e-6  # what each operator takes on the fake clock


class Misuse(RuntimeError):
    """Something that a real device punishes."""


class FakeCuda(Device):
    """One GPU made of CPU tensors.

    Args:
        identity: what it pretends to be.
        free_bytes: memory that is still to be had.
        opaque: replay by running the captured Python again, for compiled code, whose kernels cannot be recorded. The
            rules about threads, streams and results hold all the same.

    Attributes:
        waits: how often the host waited for the device.
        captures, replays: how many there were.
        lost_bytes: memory that failed captures keep; no longer in `free_bytes`.
        trims: how often memory kept for reuse was given back.
        ranges: names that work bore, in order.
    """

    kind, asynchronous = "cuda", True

    H100: ClassVar[Identity] = Identity("NVIDIA H100 80GB HBM3", "9.0", 80 * 2**30)

    def __init__(self, identity: Identity = H100, free_bytes: int | None = None, opaque: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self._identity = identity
        self.opaque = opaque
        self.free_bytes = identity.memory_bytes if free_bytes is None else free_bytes
        self.waits = self.captures = self.replays = self.trims = 0
        self.ranges = list[str]()
        self._owner = GraphThread(self)
        self._local = threading.local()
        self._inside: int | None = None  # identifier of the thread that queues into the device's stream
        self._marks = 0
        self._recording = False
        self.lost_bytes = 0
        self._workspace: _Workspace | None = None

    def identity(self) -> Identity:
        return self._identity

    def synchronize(self) -> None:
        self.forbid_waiting("synchronize")
        self.waits += 1

    def trace(self, work: Callable[[], object]) -> bytes:
        everywhere = _ExperimentalConfig(profile_all_threads=True)  # the owner's, too, whose graphs a GPU reports
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
        with _Counting() as counted:
            work()
        return max(1, counted.operators) * OPERATOR_S

    def memory(self) -> Memory:
        return Memory(self.free_bytes, self._identity.memory_bytes - self.free_bytes, self._identity.memory_bytes)

    def reset_peak(self) -> None: ...

    def release(self) -> None:
        if self._recording:
            raise Misuse("memory released while a graph is captured")
        self.trims += 1

    def mark(self) -> _Mark:
        self._require_seen()
        self._marks += 1
        return _Mark(self._marks, self._is_inside)

    def wait(self, mark: _Mark) -> None:
        if mark.number > self._marks:
            raise Misuse("waits for a mark that was never made")
        if self._is_inside:
            self._local.ordered |= not mark.inside
        elif mark.inside and mark.number > getattr(self._local, "unseen", 0):
            self._local.unseen = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        before = self._inside
        if before not in (None, threading.get_ident()):
            raise Misuse("two threads queue into the device's stream at once")
        self._inside = threading.get_ident()
        if before is None:
            self._local.ordered = False
        try:
            with self.kernels():
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
            raise Misuse("replayed without a wait for what the caller queued before")
        self._local.unseen = self._marks  # until a wait for a later mark
        self.replays += 1

    def _require_seen(self) -> None:
        if not self._is_inside and getattr(self._local, "unseen", 0):
            raise Misuse("goes on without a wait for what was replayed")

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.forbid_waiting("copy to the host")
        self._require_seen()
        copy = tensor.clone()  # as it was when the copy was queued

        def arrived() -> torch.Tensor:
            self.waits += 1
            return copy

        return arrived

    def capture(self, work: Callable[[], torch.Tensor], pool: Any = None) -> tuple[Graph, torch.Tensor]:
        self.require_stream("capture")
        self._workspace = self._workspace or _Workspace()  # the warm-ups take it
        return super().capture(work, pool)

    def record_graph(self, work: Callable[[], torch.Tensor], pool: Any) -> tuple[Graph, torch.Tensor]:
        self.captures += 1
        graph = Replayed(self, work) if self.opaque else Recorded(self)
        graph.pool = pool or self.pool()
        graph.workspace = self._workspace or _Workspace()  # in the graph's own memory, if there was none
        weakref.finalize(graph, self._graph_ended)
        result = graph.record(work)
        return graph, result

    def drop_workspaces(self) -> None:
        self._workspace = None

    def _graph_ended(self) -> None:
        if self._workspace is not None:
            self._workspace.freed = True
        self._workspace = None

    def pool(self) -> _Pool:
        return _Pool(self)

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Inside the block, this thread's operators are refused as a GPU's kernels refuse them."""
        with nullcontext() if self.opaque else _Kernels():
            yield

    @property
    def owner(self) -> GraphThread:
        return self._owner

    def without_graphs(self) -> str | None:
        return None

    def require_stream(self, what: str) -> None:
        if not self._is_inside:
            raise Misuse(f"{what} outside the device's stream")

    def forbid_waiting(self, what: str) -> None:
        if getattr(self._local, "capturing", False):
            raise Misuse(f"{what} while a graph is captured")

    @contextmanager
    def capturing(self) -> Iterator[None]:
        if getattr(self._local, "capturing", False):
            raise Misuse("a capture inside a capture")
        self._local.capturing = self._recording = True
        try:
            yield
        finally:
            self._local.capturing = self._recording = False


class _Mark(NamedTuple):
    """The end of what was queued when it was made; `inside`: into the device's stream."""

    number: int
    inside: bool


class _Workspace:
    """Scratch memory of the libraries for one stream."""

    freed = False


class _Pool:
    """Memory of graphs that never run at the same time: as much as the largest of them needs."""

    def __init__(self, device: FakeCuda) -> None:
        self.device = device
        self.held_bytes = 0
        weakref.finalize(self, _give_back, device, sizes := [0])
        self._sizes = sizes

    def require(self, size_bytes: int) -> None:
        """Grow to `size_bytes`."""
        more = max(0, size_bytes - self.held_bytes)
        if more > self.device.free_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {more} bytes.")
        self.device.free_bytes -= more
        self.held_bytes += more
        self._sizes[0] = self.held_bytes

    def lose(self) -> None:
        """A capture failed: what it took is never given back."""
        self.device.lost_bytes += self.held_bytes
        self._sizes[0] = 0


def _give_back(device: FakeCuda, sizes: list[int]) -> None:
    device.free_bytes += sizes[0]


class _Graph:
    """What both kinds have in common: which workspace and memory they write to."""

    workspace: _Workspace
    pool: _Pool

    def __init__(self, device: FakeCuda) -> None:
        self.device = device

    def ready(self) -> None:
        if self.workspace.freed:
            raise Misuse("replayed after the libraries' workspace that it was captured with was freed")
        self.device.replayed()


class Recorded(_Graph):
    """The operators of the captured work, run again on the buffers they had then."""

    def record(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        recorder = _Recorder(self.device, self.pool)
        try:
            with self.device.capturing(), _NoHost(), recorder:
                result = work()
        except BaseException:
            self.pool.lose()
            raise
        self.steps = recorder.steps
        return result

    def replay(self) -> None:
        self.ready()
        values: dict[int, torch.Tensor] = {}
        with torch.no_grad(), record_function(traces.REPLAY):
            for func, args, kwargs, outputs in self.steps:
                given = tree_map_only(_Slot, lambda slot: slot.value(values), (args, kwargs))
                results = func(*given[0], **given[1])
                results = results if isinstance(results, tuple | list) else (results,)
                for output, result in zip(outputs, results, strict=True):
                    if output is not None:
                        output.refresh(values, result)


class _Slot:
    """A tensor of a recorded operator: an external buffer by its address, or what an earlier operator put out."""

    def __init__(self, tensor: torch.Tensor, made: bool, view: bool = False) -> None:
        self.key = id(self)
        self.made = made
        self.place = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.nbytes = tensor.untyped_storage().nbytes()
        self.buffer = tensor if made and not view else None  # the graph's own memory lives as long as it does

    def value(self, values: dict[int, torch.Tensor]) -> torch.Tensor:
        if self.made:
            return values[self.key]
        if self.storage.expired():
            raise Misuse("replayed after a buffer that it was captured with was freed")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None or storage.nbytes() != self.nbytes:
            raise Misuse("replayed after a buffer that it was captured with was resized")
        shape, stride, offset, dtype = self.place
        return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)

    def refresh(self, values: dict[int, torch.Tensor], result: torch.Tensor) -> None:
        if self.buffer is None:
            values[self.key] = result
            return
        if result.shape != self.buffer.shape:
            raise Misuse(f"an operator's result changed its shape from {self.buffer.shape} to {result.shape}")
        values[self.key] = self.buffer.copy_(result)


class _Recorder(TorchDispatchMode):
    """Notes every operator with its tensors. What is not the result of an earlier one is an external buffer."""

    def __init__(self, device: FakeCuda, pool: _Pool) -> None:
        super().__init__()
        self.device = device
        self.pool = pool
        self.taken_bytes = 0
        self.steps: list[tuple[Any, Any, Any, list[_Slot | None]]] = []
        self._slots: dict[int, tuple[torch.Tensor, _Slot]] = {}  # the tensor too, so that its id is not given again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in WAITS:
            raise Misuse(f"{func._schema.name} waits for the device while a graph is captured")
        given = tree_map(self._slot, (args, kwargs))
        results = func(*args, **kwargs)
        several = results if isinstance(results, tuple | list) else (results,)
        inputs = {id(t): t for t in _tensors((args, kwargs))}
        storages = {t.untyped_storage().data_ptr() for t in inputs.values()}
        outputs = [self._output(each, inputs, storages) for each in several]
        self.steps.append((func, *given, outputs))
        return results

    def _slot(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._slots:
            external = _Slot(value, made=False)
            # the tensor object is kept only while recording: a graph keeps no buffer of others alive
            self._slots[id(value)] = value, external
        return self._slots[id(value)][1]

    def _output(self, result: Any, inputs: dict[int, torch.Tensor], storages: set[int]) -> _Slot | None:
        if not isinstance(result, torch.Tensor) or id(result) in inputs:  # in place: the buffer itself
            return None
        view = result.untyped_storage().data_ptr() in storages
        if not view:
            self.taken_bytes += result.untyped_storage().nbytes()
            self.pool.require(self.taken_bytes)
        made = _Slot(result, made=True, view=view)
        self._slots[id(result)] = result, made
        return made


class _NoHost(TorchFunctionMode):
    """Refuses what copies between host and device, which on a real one waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        places = [place for place in (*args[1:2], kwargs.get("device")) if isinstance(place, str)]
        moved = func is torch.Tensor.to and "cpu" in places
        if made or moved or func in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist):
            raise Misuse(f"{func.__name__} copies between host and device while a graph is captured")
        return func(*args, **kwargs)


class _Kernels(TorchFunctionMode):
    """Refuses operators as a GPU's kernels do, in torch's words."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the compiler follows this very function, and chooses kernels by itself
            return func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention and _only_flash():
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            query = kwargs.get("query", args[0] if args else None)
            if mask is not None or query.dtype not in (torch.float16, torch.bfloat16):
                raise RuntimeError("No available kernel. Aborting execution.")
        if func is torch._int_mm and args[0].shape[0] <= 16:
            raise RuntimeError(
                f"_int_mm_out_cuda: self.size(0) needs to be greater than 16, but got {args[0].shape[0]}"
            )
        return func(*args, **kwargs)


def _only_flash() -> bool:
    backends = torch.backends.cuda
    others = backends.mem_efficient_sdp_enabled(), backends.cudnn_sdp_enabled(), backends.math_sdp_enabled()
    return backends.flash_sdp_enabled() and not any(others)


class Replayed(_Graph):
    """The captured Python, run again; its result is copied into the buffer of the first."""

    def __init__(self, device: FakeCuda, work: Callable[[], torch.Tensor]) -> None:
        super().__init__(device)
        self.work = work

    def record(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self.device.capturing():
            self.result = work().clone()
        return self.result

    def replay(self) -> None:
        self.ready()
        with record_function(traces.REPLAY):
            self.result.copy_(self.work())


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
