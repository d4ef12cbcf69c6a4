"""A model for transformers' own loop: each of its forwards goes to the module of the phase."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..model import route, seam
from ..model.twins import fork

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..workload import Phase

Running = Callable[["Phase"], AbstractContextManager["PreTrainedModel"]]


def by_phase(decode: PreTrainedModel, running: Running) -> PreTrainedModel:
    """A twin of the decode module whose forward calls the module of the phase.

    Args:
        decode: the module of decode.
        running: the context in which a phase's module runs.
    """
    front = fork(decode)
    front.__dict__.pop("forward", None)  # an instance's forward would hide the route
    return route.routed(front, _PhaseSwitch(running))


class _PhaseSwitch(route.Plain):
    """One token after a filled cache is decode, everything else is prefill."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._running("decode" if seam.is_decoding(kwargs) else "prefill") as module:
            return module(*args, **kwargs)
