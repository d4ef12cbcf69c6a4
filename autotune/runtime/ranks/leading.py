"""What the variants of a sharded model ask, while one of its ranks leads the others."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...model.seam import Sampling


class Leading(Protocol):
    """Has all ranks do what this one does; `leader.Leader` is the only one."""

    def sample(self, variant: Any, call: Sampling) -> Any:
        """Serve a call of generate's loop with a variant, on all ranks."""

    def forward(self, variant: Any, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve a direct forward call with a variant, on all ranks."""

    def ask(self, name: str, own: Any) -> list[Any]:
        """Ask all ranks. Returns their answers in order, this rank's `own` first."""


LEADER: ContextVar[Leading | None] = ContextVar("LEADER", default=None)  # of the thread that tunes a sharded model
