"""Guesses for a sequence that is decoded alone. Beside others, its tokens come one by one: each row has work anyway."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..cache.slots import SlotCache
    from ..speculation.speculate import SpeculativeLogits
    from ..steps.step import NextLogits
    from ..variant import Variant
    from .request import Request


class Guessing:
    """The guesses for one request at a time.

    Args:
        variant: may guess ahead.

    Attributes:
        request: the request that they are for, or None.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.request: Request | None = None
        self._logits: SpeculativeLogits | None = None
        self._lent = ExitStack()

    def of(self, request: Request, cache: SlotCache, plain: NextLogits) -> SpeculativeLogits:
        """The source of a request's logits, which guesses from its prompt and its tokens so far.

        Args:
            cache: its keys and values.
            plain: gives the logits after a token for which nothing was guessed.
        """
        if self._logits is None or self.request is not request:
            self.end()
            speculation = self.variant.speculation
            assert speculation is not None  # noqa: S101 - the caller checked; for the type checker
            self.request, call = request, request.call
            self._logits = speculation.ahead(
                self.variant.running, call, lambda: cache, plain, self._lent, request.ids[:, :-1]
            )
        return self._logits

    def end(self) -> None:
        """Drop the guesses, because the request has ended or is decoded beside others."""
        if self.request is not None:
            self.request = self._logits = None
            self._lent.close()
