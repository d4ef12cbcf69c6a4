"""Sources of guesses for the next tokens: what followed the same tokens earlier, or a smaller model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import torch

from ...machine import device as devices
from ...model import configured, seam

if TYPE_CHECKING:
    from ...model.seam import Sampling
    from ..cache.pool import CachePool
    from ..cache.slots import SlotCache
    from .strides import MultiTokenStep

LONGEST, SHORTEST = 3, 2  # tokens that must match before a continuation is guessed; one token predicts too little


class Proposer(Protocol):
    """Guesses for one sequence that grows token by token."""

    tokens: list[int]

    def append(self, token: int) -> None:
        """Append `token` to the sequence."""

    def guess(self, most: int) -> list[int]:
        """Guess at most `most` tokens that may come next; none if no guess is likely."""


class PromptLookup:
    """Guesses by look-up: the sequence goes on as it did after the latest earlier occurrence of its last tokens.

    A continuation that reaches the sequence's end goes on with its own tokens, so that a short period is repeated as
    often as needed (as in LZ77). Source of the idea: prompt look-up decoding, Saxena 2023.

    Args:
        tokens: the sequence so far.
        longest: number of last tokens to look for first; then fewer, down to `SHORTEST`, if they never occurred.
    """

    def __init__(self, tokens: Iterable[int] = (), longest: int = LONGEST) -> None:
        self.tokens: list[int] = []
        self._lengths = range(longest, SHORTEST - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> index at which their latest continuation begins
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        for length in self._lengths:
            if len(self.tokens) >= length:
                self._after[tuple(self.tokens[-length:])] = len(self.tokens)
        self.tokens.append(token)

    def guess(self, most: int) -> list[int]:
        places = (self._after.get(tuple(self.tokens[-length:])) for length in self._lengths)
        start = next((place for place in places if place is not None), None)
        if start is None:
            return []
        period = len(self.tokens) - start
        return [self.tokens[start + i % period] for i in range(most)]


class DraftModel:
    """A smaller model's greedy continuation, over a separate static cache.

    Before it guesses, it receives all new tokens of the sequence in one step. Its guesses are removed from its cache
    each time, so that it never continues from a wrong one.

    Args:
        draft: the smaller model's steps.
        caches: its caches, with room for as many tokens as the model's.
        call: the call that is served, of one sequence.
        tokens: the prompt of the call.
        lent: the context that gives the cache back.
    """

    def __init__(
        self, draft: MultiTokenStep, caches: CachePool, call: Sampling, tokens: list[int], lent: ExitStack
    ) -> None:
        self.draft = draft
        self.caches = caches
        self.call = call
        self.tokens = tokens
        self.lent = lent
        self.device = devices.of(call.input_ids.device)
        self.room = min(caches.slots, configured.context(draft.module) or caches.slots)
        self._held: SlotCache | None = None

    def append(self, token: int) -> None:
        self.tokens.append(token)

    def guess(self, most: int) -> list[int]:
        if len(self.tokens) + most > self.room:
            return []
        held = self._cache()
        unseen = self.tokens[held.length :]
        given = torch.tensor([unseen], dtype=torch.int64, device=self.call.input_ids.device)  # [1, N]
        positions = self._position(held.length) + torch.arange(len(unseen), dtype=torch.int64, device=given.device)
        token = self.draft.steps(given, positions, held)[:, -1].argmax(-1, keepdim=True)  # [1, 1]
        held.advance(len(unseen))
        guesses, position = [token], positions[:, -1:]
        for _ in range(most - 1):
            position = position + 1
            token = self.draft.step(token, position, held).argmax(-1, keepdim=True)
            held.advance()
            guesses.append(token)
        held.advance(1 - most)
        found: list[int] = self.device.fetch(torch.cat(guesses, dim=1))()[0].tolist()
        return found

    def _cache(self) -> SlotCache:
        """The draft's cache; at the first use it is filled with the prompt."""
        if self._held is None:
            prompt, model, call = seam.growing_cache(), self.draft.module, self.call
            given = {"attention_mask": call.mask, "position_ids": call.positions, **seam.last_logits(model, 1)}
            model(call.input_ids, **given, **seam.over(model, prompt))
            self._held = self.lent.enter_context(self.caches.lend(prompt, call.mask))
        return self._held

    def _position(self, index: int) -> torch.Tensor:
        """Position [1, 1] of the sequence's token number `index`, which comes after the prompt."""
        return self.call.last_position + (index - self.call.input_ids.shape[1] + 1)
