"""A decode step recorded once as a program of C++ instructions and run by one team of threads: no Python, no dispatch.

    given -> trace -> lower -> layout -> kernels/program.cpp

`given` runs the modules that cannot be part of a program. `trace` records the step's operators on fake tensors. `lower`
turns them into instructions over named memory. `layout` decides where values are stored and when threads meet. The
operator `run_program` runs the words that result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ....errors import TransformError, VariantError
from ....machine import forking
from ...cache.slots import SlotCache
from ..step import DecodeSteps, Step
from . import layout
from .given import ModuleCalls
from .instruction import Instruction, Place
from .lower import lower
from .trace import trace

if TYPE_CHECKING:
    from torch.fx import GraphModule
    from transformers import PreTrainedModel

__all__ = ["Program", "StepPrograms"]


class Program:
    """A graph of tensor operators as a program with its memory.

    Args:
        graph: recorded operators with fake values and one output; its tensors are not copied.
        rows: values whose first dimension has this size are divided among threads by row.

    Raises:
        TransformError: an operator has no instruction.
    """

    def __init__(self, graph: GraphModule, rows: int) -> None:
        with torch.inference_mode(False):  # a program is made once, in any mode, and must run in any mode
            self._make(graph, rows)

    def _make(self, graph: GraphModule, rows: int) -> None:
        lowered = lower(graph, rows)
        meets = layout.meetings(lowered.instructions)
        offsets, size_bytes = layout.place_temporaries(lowered.instructions, meets, lowered.roots)
        self.instructions = lowered.instructions
        self.meetings = sum(meets)
        self.output = torch.zeros(lowered.output.shape, dtype=torch.float32, device="cpu")
        count = len(self.instructions)
        self.spent = torch.zeros(count, dtype=torch.int64, device="cpu")  # nanoseconds, from the latest timed run
        self.timed = False
        self._code = layout.encode(lowered.instructions, meets, offsets)
        self._arena = torch.zeros(size_bytes + layout.ALIGN_BYTES, dtype=torch.uint8, device="cpu")
        self._constants = [(root, root.tensor) for root in lowered.roots if root.tensor is not None]  # kept alive
        self._inputs = lowered.inputs
        read = {number for i in self.instructions if i.matrix for number in i.reads}
        self.weight_bytes = sum(r.size_bytes for r in lowered.roots if r.kind == "constant" and r.number in read)
        bases = [-(-self._arena.data_ptr() // layout.ALIGN_BYTES) * layout.ALIGN_BYTES]
        for root in lowered.roots:
            own = self.output if root.kind == "output" else root.tensor
            bases.append(0 if own is None else own.data_ptr())
        self._bases = tuple(bases)

    def addresses(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Addresses of the graph's inputs for `run`. The inputs must not move while the addresses are in use.

        Raises:
            TransformError: an input does not have the recorded shape, strides and dtype, or is not in the CPU's memory.
        """
        if len(inputs) != len(self._inputs):
            raise TransformError(f"the program was recorded for {len(self._inputs)} inputs, not {len(inputs)}")
        for root, whole in self._constants:
            if whole.untyped_storage().nbytes() < root.size_bytes or whole.data_ptr() != self._bases[root.number + 1]:
                raise TransformError("the program's weights have moved since it was recorded")
        bases = list(self._bases)
        for i, (place, tensor) in enumerate(zip(self._inputs, inputs, strict=True)):
            if defect := _other(place, tensor):
                raise TransformError(f"input {i} of the program is {defect}")
            bases[place.root.number + 1] = tensor.data_ptr()
        with torch.inference_mode(False):
            return torch.tensor(bases, dtype=torch.int64, device="cpu")

    def times(self) -> list[tuple[Instruction, float]]:
        """Seconds that the latest timed run spent on each instruction; empty if there was none."""
        if not self.spent.any():
            return []
        return [(i, ns / 1e9) for i, ns in zip(self.instructions, self.spent.tolist(), strict=True)]

    def run(self, addresses: torch.Tensor) -> torch.Tensor:
        """Run the program. The next run overwrites its result. Only one run may be active at a time.

        Raises:
            RuntimeError: a token or a slot was outside its table.
        """
        spent = self.spent if self.timed else None
        torch.ops.autotune.run_program(self._code, addresses, torch.get_num_threads(), spent)
        return self.output


def _other(place: Place, tensor: torch.Tensor) -> str | None:
    """How a tensor differs from the one with which a program was recorded, or None."""
    if tensor.dtype != place.dtype:
        return f"{tensor.dtype}, and was recorded as {place.dtype}"
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return f"{tensor.layout} on {tensor.device}, not strided memory of the CPU"
    if tuple(tensor.shape) != place.shape:
        return f"of shape {list(tensor.shape)}, and was recorded as {list(place.shape)}"
    steps = zip(place.shape, tensor.stride(), place.strides, strict=True)
    if any(size > 1 and own != recorded for size, own, recorded in steps):
        return f"of strides {list(tensor.stride())}, and was recorded with {list(place.strides)}"
    return None


class _Recorded:
    """The recorded step for one shape of cache."""

    def __init__(self, module: PreTrainedModel, cache: SlotCache) -> None:
        batch = cache.shape[0]
        with torch.inference_mode(False):  # a step recorded in inference mode must also run outside it
            self.given = ModuleCalls(module, cache)
            self.program = Program(trace(module, cache, self.given), batch)
            self.token = torch.zeros(batch, 1, dtype=torch.int64, device="cpu")
            self.position = torch.zeros(batch, 1, dtype=torch.int64, device="cpu")
        self.lock = forking.lock()

    def over(self, cache: SlotCache) -> Step:
        inputs = (self.token, self.position, cache.slot, cache.valid, *cache.keys, *cache.values, *self.given.tensors)
        addresses = self.program.addresses(inputs)

        def step(
            token: torch.Tensor, position: torch.Tensor, _cache: SlotCache, _held: object = inputs
        ) -> torch.Tensor:
            # `_held` keeps the tensors at the addresses alive
            if token.shape != self.token.shape or position.shape != self.token.shape:
                shapes = f"{list(token.shape)} and {list(position.shape)}"
                raise VariantError(f"the step takes token and position {list(self.token.shape)}, not {shapes}")
            with self.lock:
                self.token.copy_(token)
                self.position.copy_(position)
                self.given.update(self.position)
                return self.program.run(addresses).clone()

        return step


def _key(cache: SlotCache) -> tuple[int, int, int]:
    return *cache.shape, cache.slot.shape[0]


class StepPrograms(DecodeSteps):
    """Decode steps of one module as programs, by the shape of the cache."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self._steps: dict[tuple[int, int, int], _Recorded] = {}  # (rows, slots, 1 or a write slot for each row)
        self._lock = forking.lock()

    def prepare(self, cache: SlotCache) -> None:
        """Record the step for this cache's shape, unless it is recorded already.

        Raises:
            TransformError: the step cannot be recorded as a program.
        """
        with self._lock:
            if (key := _key(cache)) not in self._steps:
                self._steps[key] = _Recorded(self.module, cache)

    def forget(self) -> None:
        """Drop programs, because weights have moved and programs hold addresses. They are recorded again later."""
        with self._lock:
            self._steps.clear()

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple(dict.fromkeys((rows, slots) for rows, slots, _ in self._steps))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Within this context, every run records how long each instruction took; see `Program.times`."""
        programs = [step.program for step in self._steps.values()]
        for program in programs:
            program.timed = True
        try:
            yield
        finally:
            for program in programs:
                program.timed = False

    def program(self, batch: int) -> Program | None:
        """The program for a batch of `batch` sequences, or None if it was not recorded."""
        return next((step.program for (rows, *_), step in self._steps.items() if rows == batch), None)

    def fitting(self, cache: SlotCache) -> Step:
        """The step for this cache's shape. The first use of a shape records it, which takes a second or two."""
        self.prepare(cache)
        return self._steps[_key(cache)].over(cache)
