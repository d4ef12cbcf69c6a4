"""Keys and values of prompts and their beginnings, which the next prompt that is or begins alike need not compute."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ...machine.device.failures import classify
from ...model import seam

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

MOST_BYTES = 256 * 2**20
MOST_LAST_BYTES = 64 * 2**20  # of last parts, apart: prompts that are asked once must not displace beginnings

Beginning = tuple[int, ...]  # tokens from the start of a prompt


class Part(NamedTuple):
    """A part of a prompt.

    Args:
        pairs: its keys and values [1, Hk, T, D] per layer.
        logits: of its last token, [1, V], if that is the prompt's last one.
    """

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    logits: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        last = 0 if self.logits is None else self.logits.nbytes
        return last + sum(held.nbytes for pair in self.pairs for held in pair)


class LatestParts:
    """The latest used parts, each by all tokens from the start of its prompt to its end.

    Args:
        most_bytes: that they have at most.

    Attributes:
        nbytes: that they have.
    """

    def __init__(self, most_bytes: float) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._kept: OrderedDict[Beginning, Part] = OrderedDict()

    def __contains__(self, beginning: Beginning) -> bool:
        return beginning in self._kept

    def get(self, beginning: Beginning) -> Part | None:
        if (part := self._kept.get(beginning)) is not None:
            self._kept.move_to_end(beginning)
        return part

    def clear(self) -> None:
        self._kept.clear()
        self.nbytes = 0

    def put(self, beginning: Beginning, part: Part) -> None:
        self._kept[beginning] = part
        self.nbytes += part.nbytes
        while self.nbytes > self.most_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes


class Prefixes:
    """Prompts and their beginnings of whole parts, the latest used ones.

    A part is computed from the tokens before it and its own, whatever comes after. So a prompt gets the same numbers,
    to the bit, whether its parts are computed or found.

    Args:
        part: tokens of a part. A prompt of fewer tokens is one.
        least: tokens that a last part has at least where others are before it; fewer are added to the one before.
        side: a beginning that was found may end at each multiple of so many tokens, within a last part, too, because
            numbers are the same to the bit; 0: only where a part ends.
        most_bytes: keys and values of beginnings that are kept at most.
        most_last_bytes: keys, values and logits of prompts' last parts that are kept at most.

    Attributes:
        tokens_queried: tokens of prompts that were looked up.
        tokens_found: those of them that were found and not computed.
    """

    def __init__(
        self,
        part: int,
        least: int = 1,
        side: int = 0,
        *,
        most_bytes: float = MOST_BYTES,
        most_last_bytes: float = MOST_LAST_BYTES,
    ) -> None:
        self.part = part
        self.least = least
        self.side = side
        self.tokens_queried = 0
        self.tokens_found = 0
        self._beginnings = LatestParts(most_bytes)
        self._last = LatestParts(most_last_bytes)

    def fill(self, cache: Any, prompt: Beginning) -> tuple[int, torch.Tensor | None]:
        """Fill an empty cache with as many parts of a prompt as are known.

        Returns:
            The number of tokens that need not be computed, and the last one's logits [1, V] if these are all.
        """
        found, before_last, logits = list[Part](), self._before_last(prompt), None
        most = max(0, len(prompt) - self.least) // self.side * self.side if self.side else before_last
        while len(found) * self.part < most:
            part = self._beginnings.get(prompt[: (len(found) + 1) * self.part])
            if part is None:
                break
            found.append(part)
        done = min(len(found) * self.part, most)
        if done >= before_last and (last := self._last.get(prompt)) is not None:
            found = [*found[: before_last // self.part], last]
            done, logits = len(prompt), last.logits
        for number, part in enumerate(found):
            here = slice(done - number * self.part)
            for layer, (keys, values) in enumerate(part.pairs):
                cache.update(keys[:, :, here], values[:, :, here], layer)
        self.tokens_queried += len(prompt)
        self.tokens_found += done
        return done, logits

    def emptied(self, keeps: bool) -> Self:
        """As many tokens a part, and no prompts yet; nothing is ever kept unless `keeps`."""
        limits = {} if keeps else {"most_bytes": 0, "most_last_bytes": 0}
        return type(self)(self.part, self.least, self.side, **limits)

    def end_of(self, begin: int, tokens: int, most: int) -> int:
        """Where a forward ends that computes the next parts of a prompt. Pure.

        Args:
            begin: where it begins: at a part, or where what was found ends.
            tokens: of the prompt.
            most: tokens of parts to compute at most, a multiple of `part`; a last part has up to `least` - 1 more.
        """
        return tokens if tokens - begin < most + self.least else begin + most

    def keep(self, cache: Any, prompt: Beginning, begin: int, end: int) -> None:
        """Keep the whole parts that begin at token `begin` or later and end by `end`, from the prompt's cache.

        Those within a last part that is longer are kept only if a beginning may end there.
        """
        end = end if self.side else min(end, self._before_last(prompt))
        with self._sparing():
            for start in range(-(-begin // self.part) * self.part, end - self.part + 1, self.part):
                part = slice(start, start + self.part)
                if (beginning := prompt[: part.stop]) not in self._beginnings:
                    self._beginnings.put(beginning, Part(_copied(cache, part)))

    def keep_last(self, cache: Any, prompt: Beginning, logits: torch.Tensor) -> None:
        """Keep the last part of a prompt from its cache, with the last token's logits [1, V]."""
        if prompt not in self._last:
            with self._sparing():
                self._last.put(prompt, Part(_copied(cache, slice(self._before_last(prompt), None)), logits.clone()))

    def forget(self) -> None:
        """Keep nothing of what was kept so far."""
        self._beginnings.clear()
        self._last.clear()

    @contextmanager
    def _sparing(self) -> Iterator[None]:
        """Where memory has no room for a copy, free all of them: they only spare computing what later prompts ask."""
        try:
            yield
        except Exception as error:
            if classify(error) != "memory":
                raise
            self.forget()

    def knows_last(self, prompt: Beginning) -> bool:
        """Whether the last part of a prompt is known."""
        return prompt in self._last

    def _before_last(self, prompt: Sequence[int]) -> int:
        """Tokens of a prompt before its last part."""
        return max(0, len(prompt) - self.least) // self.part * self.part


def _copied(cache: Any, tokens: slice) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of some of a cache's tokens."""
    return [(keys[:, :, tokens].clone(), values[:, :, tokens].clone()) for keys, values in seam.keys_and_values(cache)]
