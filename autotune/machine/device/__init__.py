"""What differs between a CPU and a GPU, behind one interface; everything else is written once.

    of(model)  ->  Cpu | Cuda        or, in tests, the device that `stand_in` puts in their place

A GPU works through a queue while the host continues. So a measured time is right only if the host waited for the work,
other streams may read a tensor before it is written, and a call may report an error that it did not cause. These
methods handle that for callers: `synchronize`, `seconds`, `mark` and `wait`, `fetch`, `failure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .base import Address, Device, Graph, Identity, Kind, Memory
from .cpu import Cpu
from .cuda import Cuda
from .failures import Failure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Address", "Device", "Failure", "Graph", "Identity", "Kind", "Memory", "of", "stand_in"]

_stood_in: Device | None = None
_known: dict[torch.device, Device] = {}


def of(where: torch.device | str | PreTrainedModel) -> Device:
    """The device of a name ("cpu", "cuda", "cuda:1") or of a model's first weights."""
    if _stood_in is not None:
        return _stood_in
    found = torch.device(where) if isinstance(where, str | torch.device) else where.device
    if str(found) == "cuda":
        found = torch.device("cuda", torch.cuda.current_device())
    if found not in _known:
        _known[found] = Cuda(found) if found.type == "cuda" else Cpu(found)
    return _known[found]


@contextmanager
def stand_in(device: Device) -> Iterator[Device]:
    """Inside the block, treat every model as placed on `device`. It lets tests run without the hardware."""
    global _stood_in
    before, _stood_in = _stood_in, device
    try:
        yield device
    finally:
        _stood_in = before
