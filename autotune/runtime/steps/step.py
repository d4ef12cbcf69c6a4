"""What decodes a token over slots: the one type of recorded, compiled and captured steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..cache.slots import SlotCache

NextLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # token [B, 1], position [B, 1] -> logits [B, V]
Step = Callable[[torch.Tensor, torch.Tensor, "SlotCache"], torch.Tensor]  # the same over a cache, which it writes


class DecodeSteps(ABC):
    """Steps of one module, by the shapes of caches that they were made for."""

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(batch, slots) of every step there is."""

    @abstractmethod
    def fitting(self, cache: SlotCache) -> Step | None:
        """The step for a cache of this shape; None to run the module as it is."""

    @abstractmethod
    def forget(self) -> None:
        """Drop whatever holds addresses of the model's memory: they have changed."""
