"""Has the model changed since it was tuned? Cheap enough to ask at every call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Snapshot:
    """The module tree and its tensors as they were: which objects, where their data lies, how often written to.

    It sees exchanged modules (LoRA), replaced or written tensors (load_state_dict, merges) and conversions (`.to`,
    `.half`). Writes through `tensor.data` leave no mark in PyTorch and are not seen.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._children = [
            (module._modules, name, child) for module in model.modules() for name, child in module._modules.items()
        ]
        self._tensors = [
            (held, name, tensor, _mark(tensor))
            for module in model.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]

    def changed(self) -> str | None:
        """What changed, or None."""
        for children, name, child in self._children:
            if children.get(name) is not child:
                return f"module {name} was replaced"
        for held, name, tensor, mark in self._tensors:
            if held.get(name) is not tensor:
                return f"tensor {name} was replaced"
            if _mark(tensor) != mark:
                return f"tensor {name} was written to or converted"
        return None


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
