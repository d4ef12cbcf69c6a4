"""A lowered step as a text and tensors, so that a process that decodes with the same plan need not record it again.

A program's constants are tensors of the module (weights) or values that were folded when it was lowered. The text names
the former, with how they lie in memory, and the latter are kept. A text is read for a module whose tensors of these
names lie as they did.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .instruction import Instruction, Place, Ref, Root, Share
from .lower import Lowered

if TYPE_CHECKING:
    from torch import nn

MOST_FOLDED = 16 << 20  # bytes of folded values that are kept; more are weights in another form
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
NAMED = {str(dtype): dtype for dtype in DTYPES}

Inputs = list[list[Any]]  # shape, strides and dtype of each input, as JSON gives them back


class KeptSteps(Protocol):
    """Lowered steps that are kept."""

    def find(self, module: nn.Module, inputs: Inputs) -> Lowered | None:
        """The step of a module for such inputs, or None."""


KEPT: ContextVar[KeptSteps | None] = ContextVar("kept", default=None)


@contextmanager
def reusing(steps: KeptSteps | None) -> Iterator[None]:
    """Within this context, `StepPrograms` are made that look here before they record a step."""
    token = KEPT.set(steps)
    try:
        yield
    finally:
        KEPT.reset(token)


def like(inputs: Sequence[torch.Tensor], shared: Container[int]) -> Inputs:
    """How the inputs of a step lie.

    Args:
        shared: numbers of the inputs of which all rows use one row's memory.
    """
    strides = ([0, *t.stride()[1:]] if i in shared else list(t.stride()) for i, t in enumerate(inputs))
    return [[list(t.shape), own, str(t.dtype)] for t, own in zip(inputs, strides, strict=True)]


def inputs_of(lowered: Lowered) -> Inputs:
    """How the inputs lie that a step was lowered for."""
    return [[list(place.shape), list(place.strides), str(place.dtype)] for place in lowered.inputs]


def written(lowered: Lowered, module: nn.Module) -> tuple[str, dict[str, torch.Tensor]] | None:
    """A step as a text, and the folded values by the numbers of their roots; None if those take too much memory."""
    lying: dict[int, dict[str, Any]] = {}
    for name, tensor in _tensors(module).items():
        lying.setdefault(_address(tensor), {})[name] = _lies(tensor)
    folded, roots = dict[str, torch.Tensor](), list[Any]()
    for root in lowered.roots:
        names = {} if root.tensor is None else lying.get(_address(root.tensor), {})
        if root.tensor is not None and not names:
            folded[str(root.number)] = root.tensor
        roots.append([root.kind, root.size_bytes, names])
    if sum(tensor.nbytes for tensor in folded.values()) > MOST_FOLDED:
        return None
    text = {
        "roots": roots,
        "instructions": [
            [i.code, i.share, list(map(_word, i.words)), sorted(i.reads), sorted(i.writes), i.matrix]
            for i in lowered.instructions
        ],
        "inputs": list(map(_place, lowered.inputs)),
        "output": _place(lowered.output),
    }
    return json.dumps(text), folded


def read(text: str, folded: Mapping[str, torch.Tensor], module: nn.Module) -> Lowered:
    """The step that `written` wrote.

    Raises:
        ValueError: the module's tensors do not lie as those of the module that the step was recorded from.
        Exception: any other error from parsing what was not written here.
    """
    found, tensors = json.loads(text), _tensors(module)
    roots = []
    for number, (kind, size_bytes, names) in enumerate(found["roots"]):
        held = folded.get(str(number))
        for name, lies in names.items():
            if name not in tensors or _lies(tensors[name]) != lies:
                raise ValueError(f"{name} does not lie as it did")
            whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensors[name].untyped_storage())
            if held is not None and held.data_ptr() != whole.data_ptr():
                raise ValueError(f"{name} has memory of its own")
            held = whole
        if (held is None) != (kind != "constant") or (held is not None and held.numel() != size_bytes):
            raise ValueError(f"memory {number} of the program is missing")
        roots.append(Root(number, kind, size_bytes, held))

    def place(given: Any) -> Place:
        root, offset, shape, strides, dtype = given
        return Place(roots[root], offset, tuple(shape), tuple(strides), NAMED[dtype])

    instructions = [
        Instruction(
            code,
            Share(share),
            tuple(Ref(*word) if isinstance(word, list) else word for word in words),
            frozenset(reads),
            frozenset(writes),
            matrix and tuple(matrix),
        )
        for code, share, words, reads, writes, matrix in found["instructions"]
    ]
    return Lowered(tuple(instructions), tuple(roots), tuple(map(place, found["inputs"])), place(found["output"]))


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a module or one of its parts has as an attribute, under all of its names."""
    return {
        f"{prefix}.{name}": value
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name, value in (*part._parameters.items(), *part._buffers.items(), *vars(part).items())
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    }


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _lies(tensor: torch.Tensor) -> list[Any]:
    """How a tensor lies in its storage; as JSON gives it back."""
    size_bytes, shape, strides = tensor.untyped_storage().nbytes(), list(tensor.shape), list(tensor.stride())
    return [str(tensor.dtype), size_bytes, int(tensor.storage_offset()), shape, strides]


def _place(place: Place) -> list[Any]:
    return [place.root.number, place.offset, place.shape, place.strides, str(place.dtype)]


def _word(word: int | float | Ref) -> Any:
    return [word.root, word.offset_bytes] if isinstance(word, Ref) else word
