"""Keys and values of prompts' beginnings, which the next prompt that begins alike need not compute again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from ...model import seam

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_BYTES = 256 * 2**20

Beginning = tuple[int, ...]  # tokens from the start of a prompt


class Prefixes:
    """Beginnings of whole parts of a prompt, the latest used ones.

    A part is computed from the tokens before it and its own, whatever comes after. So a prompt gets the same numbers,
    to the bit, whether its first parts are computed or found.

    Args:
        part: tokens of a part.
        most_bytes: keys and values that are kept at most.

    Attributes:
        tokens_queried: tokens of prompts that were looked up.
        tokens_found: those of them that were found and not computed.
    """

    def __init__(self, part: int, most_bytes: float = MOST_BYTES) -> None:
        self.part = part
        self.most_bytes = most_bytes
        self.tokens_queried = 0
        self.tokens_found = 0
        self._kept: OrderedDict[Beginning, list[Any]] = OrderedDict()  # the keys and values of the last part alone
        self._bytes = 0

    def fill(self, cache: Any, prompt: Sequence[int]) -> int:
        """Fill an empty cache with as many parts of a prompt as are known, except the last token's.

        Returns:
            The number of tokens that need not be computed.
        """
        found = list[list[Any]]()
        for end in range(self.part, len(prompt), self.part):
            beginning = tuple(prompt[:end])
            if beginning not in self._kept:
                break
            self._kept.move_to_end(beginning)
            found.append(self._kept[beginning])
        for pairs in found:
            for layer, (keys, values) in enumerate(pairs):
                cache.update(keys, values, layer)
        self.tokens_queried += len(prompt)
        self.tokens_found += len(found) * self.part
        return len(found) * self.part

    def keep(self, cache: Any, prompt: Sequence[int], end: int) -> None:
        """Keep the part of a prompt that ends before token `end`, from a cache that has just that many tokens."""
        beginning = tuple(prompt[:end])
        if end % self.part or beginning in self._kept:
            return
        pairs = [
            tuple(held[:, :, end - self.part : end].clone() for held in layer) for layer in seam.keys_and_values(cache)
        ]
        self._kept[beginning] = pairs
        self._bytes += _bytes(pairs)
        while self._bytes > self.most_bytes and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= _bytes(dropped)


def _bytes(pairs: list[Any]) -> int:
    return sum(held.nbytes for pair in pairs for held in pair)
