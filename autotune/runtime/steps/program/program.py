"""A lowered graph as a program with its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ....errors import TransformError
from . import layout
from .instruction import Instruction, Place

if TYPE_CHECKING:
    from .lower import Lowered


MOVED = "the program's weights have moved since it was recorded"


class Program:
    """A lowered graph as a program with its memory.

    Args:
        lowered: the instructions; the tensors of its constants are not copied.
    """

    def __init__(self, lowered: Lowered) -> None:
        with torch.inference_mode(False):  # a program is made once, in any mode, and must run in any mode
            self._make(lowered)

    def _make(self, lowered: Lowered) -> None:
        self.lowered = lowered
        meets = layout.meetings(lowered.instructions)
        offsets, size_bytes = layout.place_temporaries(lowered.instructions, meets, lowered.roots)
        self.meetings = sum(meets)
        count = len(lowered.instructions)
        self.spent = torch.zeros(count, dtype=torch.int64, device="cpu")  # nanoseconds, from the latest timed run
        self.timed = False
        self._code = layout.encode(lowered.instructions, meets, offsets)
        self._arena = torch.zeros(size_bytes + layout.ALIGN_BYTES, dtype=torch.uint8, device="cpu")
        self._weights = [root.tensor for root in lowered.roots if root.tensor is not None]  # kept alive
        self._sizes = [root.size_bytes for root in lowered.roots if root.tensor is not None]
        read = {number for i in lowered.instructions if i.matrix for number in i.reads}
        self.weight_bytes = sum(r.size_bytes for r in lowered.roots if r.kind == "constant" and r.number in read)
        bases = [-(-self._arena.data_ptr() // layout.ALIGN_BYTES) * layout.ALIGN_BYTES]
        bases += [0 if root.tensor is None else root.tensor.data_ptr() for root in lowered.roots]
        self._bases = tuple(bases)
        self._places = list(map(torch.Tensor.data_ptr, self._weights))

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        return self.lowered.instructions

    def room(self) -> torch.Tensor:
        """Memory for the graph's output."""
        with torch.inference_mode(False):
            return torch.zeros(self.lowered.output.shape, dtype=torch.float32, device="cpu")

    def addresses(self, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Addresses of the graph's inputs and output for `run`. They must not move while the addresses are in use.

        Args:
            output: from `room`.

        Raises:
            TransformError: an input does not have the recorded shape, strides and dtype, or is not in the CPU's memory.
        """
        if len(inputs) != len(self.lowered.inputs):
            raise TransformError(f"the program was recorded for {len(self.lowered.inputs)} inputs, not {len(inputs)}")
        if any(w.untyped_storage().nbytes() < size for w, size in zip(self._weights, self._sizes, strict=True)):
            raise TransformError(MOVED)
        self.require_weights()
        bases = list(self._bases)
        for i, (place, tensor) in enumerate(zip(self.lowered.inputs, inputs, strict=True)):
            if defect := _other(place, tensor):
                raise TransformError(f"input {i} of the program is {defect}")
            bases[place.root.number + 1] = tensor.data_ptr()
        bases[self.lowered.output.root.number + 1] = output.data_ptr()
        with torch.inference_mode(False):
            return torch.tensor(bases, dtype=torch.int64, device="cpu")

    def require_weights(self) -> None:
        """Raise TransformError if the program's weights are not where they were when it was recorded."""
        if list(map(torch.Tensor.data_ptr, self._weights)) != self._places:
            raise TransformError(MOVED)

    def times(self) -> list[tuple[Instruction, float]]:
        """Seconds that the latest timed run spent on each instruction; empty if there was none."""
        if not self.spent.any():
            return []
        return [(i, ns / 1e9) for i, ns in zip(self.instructions, self.spent.tolist(), strict=True)]

    def run(self, addresses: torch.Tensor) -> None:
        """Run the program. Only one run may be active at a time.

        Raises:
            RuntimeError: a token or a slot was outside its table.
        """
        spent = self.spent if self.timed else None
        torch.ops.autotune.run_program(self._code, addresses, torch.get_num_threads(), spent)


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
