"""Messages between the ranks of a model, over a group of their own, so that they meet no collective of the model."""

from __future__ import annotations

import io
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Line:
    """All ranks make one together, and close it together.

    Args:
        members: the ranks.
        timeout_s: seconds after which a rank that waits for a message, or for another rank to join, gives up.

    Raises:
        RuntimeError: a rank did not join in time.
    """

    def __init__(self, members: ProcessGroup, timeout_s: float) -> None:
        from torch import distributed

        ranks = distributed.get_process_group_ranks(members)
        self._group = distributed.new_group(ranks, timedelta(seconds=timeout_s), "gloo")
        self._first = ranks[0]
        self.rank: int = distributed.get_rank(self._group)

    @property
    def leads(self) -> bool:
        """Whether this is the first rank."""
        return self.rank == 0

    def send(self, message: object) -> None:
        """Send a message from the first rank to all others."""
        from torch import distributed

        distributed.broadcast_object_list([message], self._first, self._group)

    def receive(self) -> Any:
        """Wait for the first rank's message."""
        from torch import distributed

        given: list[Any] = [None]
        distributed.broadcast_object_list(given, self._first, self._group)
        return given[0]

    def gather(self, value: Any) -> list[Any]:
        """Exchange values. Returns those of all ranks in order; every rank gets the same."""
        from torch import distributed

        values: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(values, value, self._group)
        return values

    def close(self) -> None:
        from torch import distributed

        distributed.destroy_process_group(self._group)


def packed(value: object) -> bytes:
    """A value with tensors on any device, as bytes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpacked(content: bytes, device: torch.device) -> Any:
    """The value that another rank has `packed`, with its tensors on this rank's device."""
    return torch.load(io.BytesIO(content), map_location=device, weights_only=False)
