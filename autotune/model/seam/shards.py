"""How transformers shards a model over ranks: it replaces the forward of each sharded module (from 5.18).

Such a forward is a closure over the module, its former forward and the device mesh. It brings inputs and outputs to the
layout that the next layer expects, by collectives.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

PACKAGE = "transformers.distributed."  # defines the forwards of sharded modules


def is_sharding(forward: Any) -> bool:
    """Whether a function is a forward that transformers gave to a sharded module."""
    return type(forward) is types.FunctionType and (forward.__module__ or "").startswith(PACKAGE)


def resharding(forward: types.FunctionType, copied: Callable[[Any], Any]) -> types.FunctionType:
    """The same forward over copies of what it refers to: the module and the forward that it encloses.

    Args:
        forward: `is_sharding` holds for it.
        copied: gives the copy of a value.
    """
    cells = tuple(types.CellType(copied(cell.cell_contents)) for cell in forward.__closure__ or ())
    made = types.FunctionType(forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, cells)
    made.__module__ = forward.__module__
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def tensor_parallel(model: Any) -> tuple[int, Any]:
    """How many ranks share a model's layers by transformers' plan, and their group; (1, None) if they do not."""
    size, mesh = getattr(model, "_tp_size", None) or 1, getattr(model, "_device_mesh", None)
    if size == 1 or mesh is None:
        return 1, None
    return size, mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def sharded(module: torch.nn.Module) -> bool:
    """Whether a module's own forward was replaced because it is sharded."""
    return is_sharding(vars(module).get("forward"))
