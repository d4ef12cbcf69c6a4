"""A model whose layers are sharded over ranks by transformers' tensor-parallel plan.

Every forward of such a model has collectives: all ranks must run it, or all of them wait. What one rank runs by itself,
to find out whether it runs at all, is run `alone`: collectives then return this rank's own part, in the right shape.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import seam

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

SUBCLASSES = ("DTensor", "AsyncCollectiveTensor")  # tensors that are sharded, or on their way
COLLECTIVES = ("_c10d_functional", "c10d")  # namespaces of operators that wait for other ranks


def group(model: PreTrainedModel) -> ProcessGroup | None:
    """The ranks over which a model's layers are sharded, or None."""
    found: ProcessGroup | None = seam.tensor_parallel(model)[1]
    return found


def ranks(model: PreTrainedModel) -> int:
    """Over how many ranks a model's layers are sharded."""
    return seam.tensor_parallel(model)[0]


def local(tensor: Any) -> Any:
    """This rank's part of a tensor; anything that is not sharded as it is."""
    return tensor.to_local() if type(tensor).__name__ == "DTensor" else tensor


def obstacle(model: PreTrainedModel) -> str | None:
    """Why a model that is sharded cannot be tuned, or None. A model that is not sharded has no such obstacle."""
    kinds = Counter(type(parameter).__name__ for parameter in model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3 gathers its weights from other ranks at each call; load it without DeepSpeed"
    size, members = seam.tensor_parallel(model)
    if size == 1 and not kinds["DTensor"]:
        return None
    if size == 1 or not any(map(seam.sharded, model.modules())):
        return (
            "its weights are sharded over ranks, and not by the tensor-parallel plan of transformers 5.18 or later; "
            "load it with distributed_config=DistributedConfig(tp_size=...), or tune a replica on one device"
        )
    if (getattr(model.config.distributed_config, "ep_size", None) or 1) > 1:
        return "its experts are spread over ranks (ep_size), which ranks cannot try alone; load it with ep_size=1"
    if (world := torch.distributed.get_world_size()) != torch.distributed.get_world_size(members):
        return (
            f"its layers are sharded over {size} of {world} processes; ranks are tuned together only where tensor "
            "parallelism is all there is (no data, pipeline or FSDP dimension)"
        )
    return None


def reason(model: PreTrainedModel) -> str | None:
    """Why something that needs whole layers, or calls in any order, does not fit a model, or None."""
    if (size := ranks(model)) == 1:
        return None
    return (
        f"the model's layers are sharded over {size} ranks (tensor parallel), which wait for each other in every layer"
    )


def collectives(model: PreTrainedModel) -> int:
    """How many collectives of a model's ranks this rank has begun so far."""
    members: Any = group(model)
    return 0 if members is None else int(members._get_sequence_number_for_group())


def alone(model: nn.Module, first: float = math.inf) -> AbstractContextManager[object]:
    """Within it, this rank runs a model without waiting for the others. The results have the right shape only.

    Args:
        first: only in so many collectives; this rank takes part in further ones.
    """
    size = seam.tensor_parallel(model)[0]
    return _Alone(size, first) if size > 1 else nullcontext()


class _Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers the first collectives with this rank's own part.

    Args:
        size: number of ranks.
        first: number of collectives.
    """

    def __init__(self, size: int, first: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size = size
        self._left = first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ in SUBCLASSES for kind in types):
            return NotImplemented  # these turn the operator into local ones and collectives, which come here again
        if func.namespace not in COLLECTIVES or self._left <= 0:
            return func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if name in ("wait_tensor", "_wrap_tensor_autograd"):  # nothing is on its way
            return args[0]
        self._left -= 1
        if name == "all_reduce":
            return args[0].clone()
        if name == "all_gather_into_tensor":
            return torch.cat([args[0]] * self._size)
        if name == "allreduce_":
            return args[0], torch._C._distributed_c10d.FakeWork().boxed()
        raise NotImplementedError(f"{func.name()} waits for other ranks, and cannot be run by one of them")
