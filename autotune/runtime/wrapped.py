"""What serves a wrapped model's calls now, for whoever compares it with something else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from ..model import route
from .variant import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..workload import Workload


class Wrapped(ABC):
    """A router that serves with a plan: the handle of a wrapped model."""

    @property
    @abstractmethod
    def active(self) -> Variant | None:
        """The variant that serves now; None: the original does."""

    @property
    @abstractmethod
    def given(self) -> Workload | None:
        """The workload that it was given to tune for; None: none was given."""

    @abstractmethod
    def live_request(self) -> AbstractContextManager[object]:
        """Enclose an answer that something else gives in its place: tuning then measures nothing beside it."""


def live_request(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Enclose an answer to one of a model's callers that its handle, if it has one, does not give."""
    found = _wrapped(model)
    return nullcontext() if found is None else found.live_request()


def serving_variant(model: PreTrainedModel) -> Variant:
    """The variant that answers a model's calls now: its plan's, or the model as it is."""
    active = found.active if (found := _wrapped(model)) is not None else None
    return active or Variant(route.bare(model))


def tuned_on(model: PreTrainedModel) -> tuple[tuple[int, ...], ...]:
    """Prompts that a wrapped model was given to tune for; empty if unknown."""
    given = found.given if (found := _wrapped(model)) is not None else None
    return given.prompts if given is not None else ()


def _wrapped(model: PreTrainedModel) -> Wrapped | None:
    router = model.__dict__.get(route.SLOT)
    return router if isinstance(router, Wrapped) else None
