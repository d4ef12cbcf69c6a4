"""The rank that decides: it has all others run the calls that it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import VariantError, in_words
from . import step
from .follower import perform
from .leading import LEADER
from .line import Line, packed
from .messages import Job, Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...model.seam import Sampling
    from ..variant import Variant


class Leader:
    """The first of a model's ranks, while it tunes.

    A variant's call is first run by each rank alone. One that fails on any rank fails for all, before any rank waits
    for another in a collective. The same holds for each call of a variant that is larger than those before.

    Args:
        line: to the other ranks.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._proven: dict[tuple[Any, ...], int] = {}  # (kind, transforms, rows) -> tokens of a row that all could run

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Within it, the calls that this thread makes of variants are run by all ranks."""
        token = LEADER.set(self)
        try:
            yield
        finally:
            LEADER.reset(token)

    def sample(self, variant: Variant, call: Sampling) -> Any:
        """Serve a call of generate's loop with a variant, on all ranks.

        Raises:
            VariantError: another rank failed.
            Whatever the variant raises.
        """
        job = Job("sample", variant.transforms, packed(call.portable()))
        size = call.input_ids.shape[0], call.longest
        return self._run(job, variant, size, partial(step.sample, variant, call))

    def forward(self, variant: Variant, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve a direct forward call with a variant, on all ranks.

        Raises:
            VariantError: another rank failed.
            Whatever the variant raises.
        """
        job = Job("forward", variant.transforms, packed((args, kwargs)))
        rows, tokens = (args[0] if args else kwargs["input_ids"]).shape
        return self._run(job, variant, (rows, tokens), partial(step.forward, variant, model, args, kwargs))

    def ask(self, name: str, own: Any) -> list[Any]:
        """Ask all ranks. Returns their answers in order, this rank's `own` first."""
        self._line.send(Question(name))
        return self._line.gather(own)

    def _run(self, job: Job, variant: Variant, size: tuple[int, int], own: Callable[[], Any]) -> Any:
        """Run a call of `size` (rows, tokens of a row) on all ranks. Returns what `own` gives here."""
        rows, tokens = size
        key = (job.kind, job.transforms, rows)
        if job.transforms and tokens > self._proven.get(key, 0):
            first = replace(job, alone=True)
            self._together(first, partial(perform, variant, first))
            self._proven[key] = tokens
        return self._together(job, own)

    def _together(self, job: Job, own: Callable[[], Any]) -> Any:
        self._line.send(job)
        token = LEADER.set(None)  # a call within a call is run by all ranks already
        try:
            result = own()
        except Exception as error:
            self._line.gather(in_words(error))
            raise
        finally:
            LEADER.reset(token)
        failures = self._line.gather(None)
        if (found := next((n for n, failure in enumerate(failures) if failure), None)) is not None:
            raise VariantError(f"rank {found} failed: {failures[found]}")
        return result
