"""A 16-bit module that computes in FP32 between its packed layers, as recorded steps do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import TransformError
from ..model import linear_layers
from . import kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

NARROW = (torch.bfloat16, torch.float16)
PACKED = (kernels.PackedLinear, linear_layers.Replacement)  # layers that compute in FP32 already


class WideRows(nn.Module):
    """An embedding that returns its rows in FP32. The table keeps its dtype and stays shared."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows: torch.Tensor = self.embedding(*args, **kwargs).float()
        return rows


def is_narrow(model: nn.Module) -> bool:
    """Whether any tensor outside packed layers is in 16 bits."""
    return next(_narrow(model), None) is not None


def widen(twin: nn.Module) -> None:
    """Make a twin compute in FP32: norms and biases become FP32 copies, and embeddings return FP32 rows.

    Raises:
        TransformError: a matrix outside packed layers is in 16 bits; a copy of it would take too much memory.
    """
    for name, module in list(_narrow(twin)):
        if isinstance(module, nn.Embedding):
            twin.set_submodule(name, WideRows(module).train(module.training))
            continue
        if isinstance(module, kernels.PackedTable):
            twin.set_submodule(name, module.widened())
            continue
        for key, tensor in _own(module):
            if tensor.dim() > 1:
                where = ".".join(filter(None, (name, key)))
                raise TransformError(f"the step computes in FP32, and {where} is {tensor.dtype}: pack its layer first")
            wide = tensor.detach().float()
            if key in module._parameters:
                module._parameters[key] = nn.Parameter(wide, requires_grad=False)
            else:
                module._buffers[key] = wide


def _narrow(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules outside packed layers that hold or return tensors in 16 bits, under each of their names."""
    widened: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WideRows):
            widened.append(f"{name}.")
        elif isinstance(module, kernels.PackedTable):
            if module.dtype in NARROW:
                yield name, module
        elif not isinstance(module, PACKED) and not name.startswith(tuple(widened)) and _own(module):
            yield name, module


def _own(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    held = (*module._parameters.items(), *module._buffers.items())
    return [(key, tensor) for key, tensor in held if tensor is not None and tensor.dtype in NARROW]
