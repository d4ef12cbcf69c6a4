"""Speculative decoding: tokens are guessed, and one step of the model tells which of them it would have chosen itself.

A step that only reads weights takes about as long for five tokens as for one. So the latest token and a few guesses of
what follows go through the model together, which gives the logits after each of them. The decoding loop does not know:
`SpeculativeLogits` stands where it asks for the logits after its next token. While that token is the one that was
guessed, the logits are there already; otherwise they are discarded, and so is what the step wrote into the cache. The
loop chooses every token from the model's own logits, after the same processors and from the same random numbers as
ever. So the answer is the same, and sampled answers have the same distribution, whatever was guessed; but for rounding,
since a matmul over several rows may add up in another order than one over a single row.

Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", 2023. Accepting the
token that the model itself drew, where it is the guess, is their rule for guesses made with certainty.
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
from .pace import GuessBudget

if TYPE_CHECKING:
    from ...model.seam import Sampling
    from ..cache.pool import CachePool
    from ..cache.slots import SlotCache
    from ..steps.step import NextLogits
    from .strides import MultiTokenStep

log = logging.getLogger("autotune")

Running = Callable[[Phase], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Tally:
    """What became of guesses.

    Args:
        steps: steps that checked any.
        guessed: tokens guessed.
        right: of those, tokens that became part of an answer.
    """

    steps: int = 0
    guessed: int = 0
    right: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.steps + other.steps, self.guessed + other.guessed, self.right + other.right)

    def __str__(self) -> str:
        share = self.right / self.guessed if self.guessed else 0.0
        return f"{self.right} of {self.guessed} guessed tokens accepted ({share:.0%}) in {self.steps} steps"


class Speculation:
    """How a variant guesses ahead.

    Attributes:
        tokens: guesses per step at most.
        stride: the decode module's steps, which check guesses.
        draft: steps and caches of the model that guesses; None to look up what followed the same tokens before.
        cost: time of a step with `tokens` guesses, guessing included, in plain steps.
        tally: what became of all guesses so far.
    """

    def __init__(
        self, tokens: int, stride: MultiTokenStep, draft: tuple[MultiTokenStep, CachePool] | None = None
    ) -> None:
        self.tokens, self.stride, self.draft, self.cost, self.tally = tokens, stride, draft, 1.0, Tally()
        self._lock = forking.lock()

    def ahead(
        self, running: Running, call: Sampling, held: Callable[[], SlotCache], plain: NextLogits, lent: ExitStack
    ) -> SpeculativeLogits:
        """What gives the loop its logits during one call of one sequence.

        Args:
            running: the context that a phase's modules run in (`Variant.running`).
            call: the call that is served; input_ids [1, P].
            held: the sequence's cache.
            plain: gives the logits after a token for which nothing was guessed.
            lent: what has to be given back afterwards.
        """
        prompt = devices.of(call.input_ids.device).fetch(call.input_ids)  # while prefill runs

        def guesser() -> Proposer:
            tokens = prompt()[0].tolist()
            return PromptLookup(tokens) if self.draft is None else DraftModel(*self.draft, call, tokens, lent)

        ahead = SpeculativeLogits(running, self.stride, call, held, plain, guesser, GuessBudget(self.tokens, self.cost))
        lent.callback(lambda: self.note(ahead.tally))
        return ahead

    def note(self, tally: Tally) -> None:
        """Add up what one call came to."""
        with self._lock:
            self.tally += tally
        log.debug("speculation: %s", tally)

    def forget(self) -> None:
        """Drop graphs, to be captured anew when next needed: addresses have changed."""
        for stride in (self.stride, self.draft[0] if self.draft else None):
            if stride is not None:
                stride.forget()


class SpeculativeLogits:
    """Logits for the decoding loop, computed several tokens at a time where guesses are right."""

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
        self._running, self.stride, self.plain, self.pace = running, stride, plain, pace
        self.tally = Tally()
        self._held, self._make_guesser = held, guesser
        self._guesser: Proposer | None = None
        self._device = devices.of(call.input_ids.device)
        self._most_tokens = call.settings.max_length
        self._unread: list[Callable[[], torch.Tensor]] = []  # tokens that are on their way to the host
        self._guesses: list[int] = []  # of the latest step
        self._logits: list[torch.Tensor] = []  # after each of them, [1, V]
        self._right = 0

    def __call__(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] after `token`; token and position [1, 1]. Unless it rests, the host waits for the token."""
        self._unread.append(self._device.fetch(token))
        if self._right == len(self._guesses):
            self._settle()
        if not self._guesses and not self.pace.guesses:
            return self._without(token, position)
        guesser = self._read()
        if self._guesses:
            if self._guesses[self._right] == guesser.tokens[-1]:
                self._right += 1
                self.tally += Tally(right=1)
                return self._logits[self._right - 1]
            self._settle()
        held = self._held()
        # the last token of all is never fed back; a batch that shares its cache's rows with others has no guesses
        room = min(self._most_tokens - len(guesser.tokens) - 1, held.shape[1] - held.length - 1)
        most = min(self.pace.guesses, room) if held.shape[0] == 1 else 0
        with self._running("decode"):
            guesses = guesser.guess(most) if most > 0 else []
        return self._check(guesses, token, position, held) if guesses else self._without(token, position)

    def _without(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] after `token`, with nothing guessed."""
        self.pace = self.pace.without()
        return self.plain(token, position)

    def _read(self) -> Proposer:
        """What guesses, told of every token so far."""
        guesser = self._guesser = self._guesser or self._make_guesser()
        for arrived in self._unread:
            guesser.append(int(arrived()))
        self._unread.clear()
        return guesser

    def _check(self, guesses: list[int], token: torch.Tensor, position: torch.Tensor, held: SlotCache) -> torch.Tensor:
        """Logits [1, V] after `token`, and those after each guess for later."""
        self._guesses = guesses
        self.tally += Tally(steps=1, guessed=len(guesses))
        guessed = torch.tensor([guesses], dtype=token.dtype, device=token.device)
        tokens = torch.cat([token, guessed], dim=1)  # [1, K + 1]
        positions = position + torch.arange(tokens.shape[1], dtype=torch.int64, device=position.device)
        with self._running("decode"):
            first, *self._logits = self.stride.steps(tokens, positions, held).unbind(1)
        return first

    def _settle(self) -> None:
        """Learn from the latest guesses; none are left open."""
        if self._guesses:
            self.pace = self.pace.after(len(self._guesses), self._right)
        self._guesses, self._logits, self._right = [], [], 0
