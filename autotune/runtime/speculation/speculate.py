"""Speculative decoding: tokens are guessed, and one step of the model shows which of them it would have chosen itself.

A step that mostly reads weights takes about as long for five tokens as for one. So the latest token and a few guesses
of what follows go through the model together, which gives the logits after each of them. The decoding loop does not
know this: it asks `SpeculativeLogits` for the logits after its next token. If that token was guessed, the logits are
there already. Otherwise they are discarded, together with what the step wrote into the cache. The loop chooses every
token from the model's own logits, with the same processors and the same random numbers as without guesses. So guesses
do not change the answer, or the distribution of sampled answers, except by rounding: a matmul over several rows may add
in another order than one over a single row.

Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", 2023. A guess is
accepted if the model itself drew that token, which is their rule for guesses made with certainty.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...machine import device as devices
from ...machine import forking
from ...workload import Phase
from .drafts import DraftModel, PromptLookup, Proposer
from .pace import GuessBudget, evenly

if TYPE_CHECKING:
    from ...model.seam import Sampling
    from ..cache.pool import CachePool
    from ..cache.slots import SlotCache
    from ..steps.step import NextLogits
    from .strides import MultiTokenStep

log = logging.getLogger("autotune")

Running = Callable[[Phase], AbstractContextManager[Any]]


@dataclass(frozen=True)
class GuessCounts:
    """Counts of guesses and of their success.

    Args:
        steps: steps that checked guesses.
        guessed: tokens guessed.
        right: guessed tokens that became part of an answer.
    """

    steps: int = 0
    guessed: int = 0
    right: int = 0

    def __add__(self, other: GuessCounts) -> GuessCounts:
        return GuessCounts(self.steps + other.steps, self.guessed + other.guessed, self.right + other.right)

    def __str__(self) -> str:
        share = self.right / self.guessed if self.guessed else 0.0
        return f"{self.right} of {self.guessed} guessed tokens accepted ({share:.0%}) in {self.steps} steps"


class SpeculationSetup:
    """How a variant guesses ahead.

    Attributes:
        tokens: guesses per step at most.
        stride: the decode module's steps, which check guesses.
        draft: steps and caches of the model that guesses; None to look up what followed the same tokens before.
        costs: times of steps with 0 to `tokens` guesses; see `pace.worthwhile`.
        tally: counts of all guesses so far.
    """

    def __init__(
        self, tokens: int, stride: MultiTokenStep, draft: tuple[MultiTokenStep, CachePool] | None = None
    ) -> None:
        self.tokens = tokens
        self.stride = stride
        self.draft = draft
        self.costs = evenly(tokens, 1.0)
        self.tally = GuessCounts()
        self._lock = forking.lock()

    def ahead(
        self,
        running: Running,
        call: Sampling,
        held: Callable[[], SlotCache],
        plain: NextLogits,
        lent: ExitStack,
        ids: torch.Tensor | None = None,
    ) -> SpeculativeLogits:
        """Make the source of the loop's logits for one call of one sequence.

        Args:
            running: the context in which a phase's module runs (`Variant.running`).
            call: the call that is served; input_ids [1, P].
            held: gives the sequence's cache.
            plain: gives the logits after a token for which nothing was guessed.
            lent: the contexts to leave after the call.
            ids: the sequence before the first token that it is asked about, [1, T]; None: the prompt.
        """
        known = call.input_ids if ids is None else ids
        prompt = devices.of(known.device).fetch(known)  # copied while prefill runs

        def guesser() -> Proposer:
            tokens = prompt()[0].tolist()
            return PromptLookup(tokens) if self.draft is None else DraftModel(*self.draft, call, tokens, lent)

        ahead = SpeculativeLogits(running, self.stride, call, held, plain, guesser, GuessBudget(self.costs))
        lent.callback(lambda: self.note(ahead.tally))
        return ahead

    def note(self, tally: GuessCounts) -> None:
        """Add the counts of one call."""
        with self._lock:
            self.tally += tally
        log.debug("speculation: %s", tally)

    def forget(self) -> None:
        """Capture graphs anew, because addresses have changed. No request is under way."""
        for stride in (self.stride, self.draft[0] if self.draft else None):
            if stride is not None:
                stride.forget()


class SpeculativeLogits:
    """Logits for the decoding loop, computed for several tokens at a time if guesses are right."""

    def __init__(
        self,
        running: Running,
        stride: MultiTokenStep,
        call: Sampling,
        held: Callable[[], SlotCache],
        plain: NextLogits,
        guesser: Callable[[], Proposer],
        pace: GuessBudget,
    ) -> None:
        self._running = running
        self.stride = stride
        self.plain = plain
        self.pace = pace
        self.tally = GuessCounts()
        self._held = held
        self._make_guesser = guesser
        self._guesser: Proposer | None = None
        self._device = devices.of(call.input_ids.device)
        self._most_tokens = call.longest
        self._unread: list[Callable[[], torch.Tensor]] = []  # tokens that are being copied to the host
        self._guesses: list[int] = []  # guesses of the latest step
        self._logits: list[torch.Tensor] = []  # logits after each guess, [1, V]
        self._right = 0

    def __call__(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] after `token`; token and position are [1, 1]. While guessing, the host waits for the token."""
        self._unread.append(self._device.fetch(token))
        if self._right == len(self._guesses):
            self._settle()
        if not self._guesses and not self.pace.guesses:
            return self._without(token, position)
        guesser = self._read()
        if self._guesses:
            if self._guesses[self._right] == guesser.tokens[-1]:
                self._right += 1
                self.tally += GuessCounts(right=1)
                return self._logits[self._right - 1]
            self._settle()
        held = self._held()
        # the answer's last token is never fed back; a sequence in a cache of several rows gets no guesses
        room = min(self._most_tokens - len(guesser.tokens) - 1, held.shape[1] - held.length - 1)
        most = min(self.pace.guesses, room) if held.shape[0] == 1 else 0
        with self._running("decode"):
            guesses = guesser.guess(most) if most > 0 else []
        return self._check(guesses, token, position, held) if guesses else self._without(token, position)

    def _without(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] after `token`, without guesses."""
        self.pace = self.pace.without()
        return self.plain(token, position)

    def _read(self) -> Proposer:
        """The proposer, after it has received every token so far."""
        guesser = self._guesser = self._guesser or self._make_guesser()
        for arrived in self._unread:
            guesser.append(int(arrived()))
        self._unread.clear()
        return guesser

    def _check(self, guesses: list[int], token: torch.Tensor, position: torch.Tensor, held: SlotCache) -> torch.Tensor:
        """Logits [1, V] after `token`. Those after each guess are kept for later."""
        self._guesses = guesses
        self.tally += GuessCounts(steps=1, guessed=len(guesses))
        guessed = torch.tensor([guesses], dtype=token.dtype, device=token.device)
        tokens = torch.cat([token, guessed], dim=1)  # [1, K + 1]
        positions = position + torch.arange(tokens.shape[1], dtype=torch.int64, device=position.device)
        with self._running("decode"):
            first, *self._logits = self.stride.steps(tokens, positions, held).unbind(1)
        return first

    def _settle(self) -> None:
        """Update the pace from the latest guesses, and clear them."""
        if self._guesses:
            self.pace = self.pace.after(len(self._guesses), self._right)
        self._guesses = []
        self._logits = []
        self._right = 0
