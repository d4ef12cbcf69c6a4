"""A stream whose work runs when somebody waits for it, as late as a real one may."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tests.fakes.refusals import refusal, tensors

if TYPE_CHECKING:
    from tests.fakes.cuda import FakeCuda

OVERWRITE = {"copy_", "fill_", "zero_"}  # queued; nothing of what they overwrite is read
PRODUCTS = {"linear", "matmul", "mm", "addmm"}  # of tensors that compute them by operators of their own
LOOK = {"__get__", "size", "stride", "dim", "numel", "expand", "view", "unsqueeze", "squeeze", "__getitem__", "__len__"}


class Queue:
    """Work of one stream in its order, which any thread may wait for.

    Attributes:
        last: the number of what was queued last.
    """

    def __init__(self) -> None:
        self.last = 0
        self._pending: deque[tuple[int, Callable[[], object], frozenset[int], bool]] = deque()
        self._lock = threading.RLock()

    def put(self, work: Callable[[], object], touched: frozenset[int]) -> int:
        """Queue work that reads and writes the memory at the addresses `touched`. Returns its number."""
        with self._lock:
            self.last += 1
            self._pending.append((self.last, work, touched, torch.is_inference_mode_enabled()))
            return self.last

    def run(self, until: int | None = None) -> None:
        """Run what was queued, in its order, up to a number."""
        with self._lock, torch._C.DisableTorchFunction():
            while self._pending and (until is None or self._pending[0][0] <= until):
                _, work, _, inference = self._pending.popleft()
                try:
                    with torch.inference_mode() if inference else torch.no_grad():
                        work()
                except BaseException:  # a device that fails does none of the rest
                    self._pending.clear()
                    raise

    def touches(self, address: int) -> bool:
        """Whether anything that has not run yet reads or writes the memory there."""
        with self._lock:
            return any(address in touched for _, _, touched, _ in self._pending)


def addresses(tree: Any) -> frozenset[int]:
    """Where the memory of the tensors of a call is."""
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors(tree))


def spoil(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with garbage. Returns it."""
    floating = tensor.is_floating_point()
    with torch.no_grad():
        return tensor.fill_(float("nan") if floating else tensor.dtype != torch.bool and torch.iinfo(tensor.dtype).min)


class Stream(TorchFunctionMode):
    """Operators of one thread, refused as a GPU's are, and queued if they only overwrite.

    All others run at once, after what was queued before them, as if the device had been quick. So does everything while
    a graph is captured, or compiled.

    Args:
        queue: None to refuse alone.
    """

    def __init__(self, device: FakeCuda, queue: Queue | None) -> None:
        super().__init__()
        self.device = device
        self.queue = queue

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the compiler follows this very function, and chooses kernels by itself
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in PRODUCTS and any(t not in (torch.Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # a quantised weight's own operators come here, then
        if (refused := refusal(func, args, kwargs, self.device.capability)) and self.device.keeps(refused[0]):
            raise RuntimeError(refused[1])
        if self.queue is None or self.device.is_recording:
            return func(*args, **kwargs)
        if name in OVERWRITE and self.device.keeps("lazy"):
            return self._queued(func, args, kwargs)
        if name not in LOOK or any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(args[1:])):
            self.queue.run()
        return func(*args, **kwargs)

    def _queued(self, func: Any, args: Any, kwargs: Any) -> Any:
        assert self.queue is not None
        (target, *rest), mine = args, args[0].untyped_storage().data_ptr()
        unread = not self.queue.touches(mine) and mine not in addresses((rest, kwargs))
        self.queue.put(lambda: func(*args, **kwargs), addresses((args, kwargs)))
        return spoil(target) if unread else target


@contextmanager
def inside(device: FakeCuda, queue: Queue | None) -> Iterator[None]:
    """Inside the block, this thread's operators are a stream's; see `Stream`. What is compiled cannot be queued."""
    with nullcontext() if device.opaque else Stream(device, queue):
        yield
