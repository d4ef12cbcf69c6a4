"""The common type of recorded, compiled and captured steps, which decode a token over slots; how making one fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ...errors import DeviceError, UnreadyError
from ...machine import outside

if TYPE_CHECKING:
    from ..cache.slots import SlotCache

# Logits are read before the next step over the same cache, which may overwrite them.
NextLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # token [B, 1], position [B, 1] -> logits [B, V]
Step = Callable[[torch.Tensor, torch.Tensor, "SlotCache"], torch.Tensor]  # the same, but it also writes a cache


@contextmanager
def preparing(batch: int) -> Iterator[None]:
    """Enclose the preparation of what decoding a batch needs: a cache and a step.

    Raises:
        UnreadyError: the body raised an error, and the device is not dead.
    """
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:
        outside.pass_on(error)
        raise UnreadyError(f"a batch of {batch} cannot be decoded: {type(error).__name__}: {error}") from error


class DecodeSteps(ABC):
    """Decode steps of one module, by the shapes of the caches they were made for."""

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(batch, slots) of every step."""

    @abstractmethod
    def fitting(self, cache: SlotCache) -> Step | None:
        """The step for a cache of this shape; None to run the module itself."""

    @abstractmethod
    def forget(self) -> None:
        """Drop or make anew what holds addresses of the model's memory, because they have changed.

        No request is under way.
        """
