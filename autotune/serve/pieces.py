"""The tokens of one answer as pieces of text, with log-probabilities where they are asked for, and why it ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .sampling import Witness

if TYPE_CHECKING:
    from .detokenise import AnswerText

LEAST = -9999.0  # stands for the logarithm of 0, as in vLLM
Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenChance:
    """A token and the logarithm of its probability."""

    token: int
    logprob: float


@dataclass(frozen=True)
class Chosen:
    """A token of the answer, with the alternatives that were asked for, likeliest first.

    Args:
        offset: where its text begins in the answer's, in characters.
    """

    token: int
    logprob: float
    alternatives: tuple[TokenChance, ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """A part of the answer.

    Args:
        text: what can be shown; it may be empty.
        tokens: number of the answer's tokens so far.
        chosen: tokens since the piece before, where log-probabilities are asked for.
        reason: why the answer ended with this piece, or None.
    """

    text: str
    tokens: int
    chosen: tuple[Chosen, ...] = ()
    reason: Reason | None = None


class Chances:
    """The log-probabilities of an answer's tokens.

    Args:
        prompt: number of tokens before the answer.
        alternatives: number of alternatives at each token.

    Attributes:
        witness: a logits processor that notes them.
    """

    def __init__(self, prompt: int, alternatives: int) -> None:
        self.witness = Witness()
        self._prompt = prompt
        self._alternatives = alternatives

    def of(self, token: int, number: int, offset: int) -> Chosen:
        """Return those of one token, once.

        Args:
            number: of the token in the answer, from 0.
            offset: where its text begins in the answer's, in characters.
        """
        row = self.witness.take(self._prompt + number)
        best = row.topk(min(self._alternatives, len(row)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        others = tuple(TokenChance(other, finite(logprob)) for other, logprob in found)
        return Chosen(token, finite(float(row[token])), others, offset)


class Pieces:
    """Makes the pieces of one answer.

    Args:
        text: of the answer, which is empty yet.
        ends: tokens that end it.
        room: most tokens that it may have.
        chances: its log-probabilities; None: they are not asked for.

    Attributes:
        tokens: number of tokens so far.
        reason: why the answer ended; None: it goes on.
    """

    def __init__(self, text: AnswerText, ends: Collection[int], room: int, chances: Chances | None) -> None:
        self._text = text
        self._ends = ends
        self._room = room
        self._chances = chances
        self.tokens = 0
        self.reason: Reason | None = None

    def add(self, token: int) -> Piece | None:
        """Return the piece that this token completes; None if it is a part of a character, or may begin a stop string.

        A token whose log-probability is asked for is a piece in any case.
        """
        chosen = () if self._chances is None else (self._chances.of(token, self.tokens, self._text.length),)
        self.tokens += 1
        is_end = token in self._ends
        shown = "" if is_end else self._text.add(token)
        if is_end or self._text.is_stopped:
            self.reason = "stop"
        elif self.tokens == self._room:
            self.reason = "length"
        if self.reason is not None:
            shown += self._text.rest()
        elif not (shown or chosen):
            return None
        return Piece(shown, self.tokens, chosen, self.reason)

    def rest(self) -> Piece:
        """Return the last piece of an answer that ended by itself, as a model's own criteria may make it."""
        self.reason = "stop"
        return Piece(self._text.rest(), self.tokens, (), self.reason)


def finite(logprob: float) -> float:
    """Return a logarithm that JSON can hold, also of a probability of 0, and of NaN, which compares as not greater."""
    return logprob if logprob > LEAST else LEAST
