"""Has the model changed since it was tuned? Cheap enough to ask at every call."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Snapshot:
    """The module tree and its tensors as they were: which objects, where their data lies, how often written to.

    It sees exchanged modules (LoRA), replaced or written tensors (load_state_dict, merges) and conversions (`.to`,
    `.half`). Writes through `tensor.data` leave no mark in PyTorch and are not seen. It keeps nothing alive.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._children = [
            (weakref.ref(module), name, weakref.ref(child))
            for module in model.modules()
            for name, child in module._modules.items()
            if child is not None
        ]
        self._tensors = [
            (weakref.ref(module), kind, name, weakref.ref(tensor), _mark(tensor))
            for module in model.modules()
            for kind in ("_parameters", "_buffers")
            for name, tensor in getattr(module, kind).items()
            if tensor is not None
        ]

    def changed(self) -> str | None:
        """What changed, or None."""
        for parent, name, reference in self._children:
            module, child = parent(), reference()
            if module is None or child is None or module._modules.get(name) is not child:
                return f"module {name} was replaced"
        for parent, kind, name, held, mark in self._tensors:
            module, tensor = parent(), held()
            if module is None or tensor is None or getattr(module, kind).get(name) is not tensor:
                return f"tensor {name} was replaced"
            if _mark(tensor) != mark:
                return f"tensor {name} was written to or converted"
        return None


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
