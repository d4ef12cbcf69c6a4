"""Graphs of the fake device: operators that were captured, replayed on the buffers that they had then."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from tests.fakes import traces
from tests.fakes.lazy import addresses, spoil
from tests.fakes.refusals import tensors, waits

if TYPE_CHECKING:
    from tests.fakes.cuda import FakeCuda


class Workspace:
    """Scratch memory of the libraries for one stream."""

    freed = False


class Pool:
    """Memory of graphs that never run at the same time: as much as the largest of them needs."""

    def __init__(self, device: FakeCuda) -> None:
        self.device = device
        self.held_bytes = 0
        weakref.finalize(self, _give_back, device, sizes := [0])
        self._sizes = sizes

    def require(self, size_bytes: int) -> None:
        """Grow to `size_bytes`."""
        more = max(0, size_bytes - self.held_bytes)
        if not self.device.keeps("pool"):
            return
        if more > self.device.free_bytes and self.device.keeps("memory"):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {more} bytes.")
        self.device.free_bytes -= more
        self.held_bytes += more
        self._sizes[0] = self.held_bytes

    def lose(self) -> None:
        """A capture failed: what it took is never given back."""
        if not self.device.keeps("leak"):
            return
        self.device.lost_bytes += self.held_bytes
        self._sizes[0] = 0


def _give_back(device: FakeCuda, sizes: list[int]) -> None:
    device.free_bytes += sizes[0]


class _Graph:
    """What both kinds have in common: which workspace and memory they write to."""

    workspace: Workspace
    pool: Pool

    def __init__(self, device: FakeCuda) -> None:
        self.device = device

    def ready(self) -> None:
        if self.workspace.freed:
            self.device.punish(
                "workspace", "replayed after the libraries' workspace that it was captured with was freed"
            )
        self.device.replayed()


class Recorded(_Graph):
    """The operators of the captured work, run again on the buffers they had then."""

    def record(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        recorder = _Recorder(self.device, self.pool)
        try:
            with self.device.capturing(), _NoHost(self.device), recorder:
                result = work()
        except BaseException:
            self.pool.lose()
            raise
        self.steps = recorder.steps
        self.touched = recorder.touched
        return result

    def replay(self) -> None:
        self.ready()
        self.device.queued(self._run, self.touched)

    def _run(self) -> None:
        values: dict[int, torch.Tensor] = {}
        with torch.no_grad(), record_function(traces.REPLAY):
            for func, args, kwargs, outputs in self.steps:
                given = tree_map_only(_Slot, lambda slot: slot.value(self.device, values), (args, kwargs))
                results = func(*given[0], **given[1])
                results = results if isinstance(results, tuple | list) else (results,)
                for output, result in zip(outputs, results, strict=True):
                    if output is not None:
                        output.refresh(self.device, values, result)


class _Slot:
    """A tensor of a recorded operator: an external buffer by its address, or what an earlier operator put out."""

    def __init__(self, tensor: torch.Tensor, made: bool, view: bool = False) -> None:
        self.key = id(self)
        self.made = made
        self.place = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.nbytes = tensor.untyped_storage().nbytes()
        self.buffer = tensor if made and not view else None  # the graph's own memory lives as long as it does

    def value(self, device: FakeCuda, values: dict[int, torch.Tensor]) -> torch.Tensor:
        if self.made:
            return values[self.key]
        shape, stride, offset, dtype = self.place
        if self.storage.expired():
            device.punish("buffers", "replayed after a buffer that it was captured with was freed")
            return spoil(torch.empty_strided(shape, stride, dtype=dtype, device="cpu"))
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None or storage.nbytes() != self.nbytes:
            device.punish("buffers", "replayed after a buffer that it was captured with was resized")
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, shape, stride)

    def refresh(self, device: FakeCuda, values: dict[int, torch.Tensor], result: torch.Tensor) -> None:
        if self.buffer is None or not device.keeps("result"):
            values[self.key] = result
            return
        if result.shape != self.buffer.shape:
            shapes = f"from {self.buffer.shape} to {result.shape}"
            device.punish("values", f"an operator's result changed its shape {shapes}")
        values[self.key] = self.buffer.copy_(result)


class _Recorder(TorchDispatchMode):
    """Notes every operator with its tensors. What is not the result of an earlier one is an external buffer."""

    def __init__(self, device: FakeCuda, pool: Pool) -> None:
        super().__init__()
        self.device = device
        self.pool = pool
        self.taken_bytes = 0
        self.steps: list[tuple[Any, Any, Any, list[_Slot | None]]] = []
        self.touched = frozenset[int]()
        self._slots: dict[int, tuple[torch.Tensor, _Slot]] = {}  # the tensor too, so that its id is not given again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(func, args, kwargs):
            self.device.punish("values", f"{func._schema.name} waits for the device while a graph is captured")
        if func not in self.device.loaded and not func.is_view:  # a view has no kernel
            self.device.punish("first", f"{func._schema.name} runs for the first time while a graph is captured")
        given = tree_map(self._slot, (args, kwargs))
        results = func(*args, **kwargs)
        several = results if isinstance(results, tuple | list) else (results,)
        inputs = {id(t): t for t in tensors((args, kwargs))}
        storages = {t.untyped_storage().data_ptr() for t in inputs.values()}
        outputs = [self._output(each, inputs, storages) for each in several]
        self.touched |= addresses((args, kwargs, several))
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

    def __init__(self, device: FakeCuda) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        places = [place for place in (*args[1:2], kwargs.get("device")) if isinstance(place, str)]
        moved = func is torch.Tensor.to and "cpu" in places
        if made or moved or func in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist):
            self.device.punish("host", f"{func.__name__} copies between host and device while a graph is captured")
        return func(*args, **kwargs)


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
