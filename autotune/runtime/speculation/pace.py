"""Pure functions that decide how far to guess ahead, from the cost of guesses and the success of earlier ones.

Source of the formula: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

FORGET = 0.9  # factor by which each guess lowers the weight of earlier ones, so that about the last ten count
HITS, TRIES = 2.0, 3.0  # right guesses and all guesses that are assumed at the start
LONGEST_REST = 64  # largest number of tokens without a guess, if guesses keep being wrong


def expected_tokens(acceptance: float, guesses: int) -> float:
    """Average number of tokens from a step with `guesses` guesses (Leviathan et al., equation 1).

    Args:
        acceptance: probability that a guess is right if those before it were, 0 to 1.
        guesses: tokens guessed.
    """
    if acceptance >= 1:
        return float(guesses + 1)
    return (1 - acceptance ** (guesses + 1)) / (1 - acceptance)


def evenly(most: int, cost: float) -> tuple[float, ...]:
    """Costs of 0 to `most` guesses, if a step with `most` guesses takes `cost` plain steps and each takes its share."""
    return tuple(1 + (cost - 1) * guesses / most for guesses in range(most + 1))


def worthwhile(acceptance: float, costs: Sequence[float]) -> int:
    """The number of guesses that gives the most tokens per time; 0 if a plain step is best.

    Args:
        acceptance: as in `expected_tokens`.
        costs: time of a step with 0, 1, 2, ... guesses, including the guessing, in units of a plain step.
    """
    return max(range(len(costs)), key=lambda guesses: expected_tokens(acceptance, guesses) / costs[guesses])


@dataclass(frozen=True)
class GuessBudget:
    """The number of guesses to make next, from the success of earlier ones.

    If guessing does not pay, it rests for some tokens and then tries a single guess. Each time that this guess is wrong
    again, the rest is twice as long.

    Args:
        costs: as in `worthwhile`.
        hits, tries: right guesses, and all guesses that were checked; the latest have the most weight.
        rest: tokens left of the current rest.
        next_rest: tokens of the next rest.
    """

    costs: tuple[float, ...]
    hits: float = HITS
    tries: float = TRIES
    rest: int = 0
    next_rest: int = 1

    @property
    def guesses(self) -> int:
        """The number of tokens to guess now."""
        if self.rest or not pays(self.costs):
            return 0
        return max(1, worthwhile(self.hits / self.tries, self.costs))

    def after(self, guessed: int, right: int) -> GuessBudget:
        """The budget after a step that accepted `right` of `guessed` tokens. Guesses after a wrong one do not count."""
        tries = right + (right < guessed)
        kept = FORGET**tries
        new = replace(self, hits=self.hits * kept + right, tries=self.tries * kept + tries)
        if worthwhile(new.hits / new.tries, self.costs):
            return replace(new, next_rest=1)
        return replace(new, rest=self.next_rest, next_rest=min(2 * self.next_rest, LONGEST_REST))

    def without(self) -> GuessBudget:
        """The budget after a token for which nothing was guessed."""
        return replace(self, rest=max(0, self.rest - 1))


def pays(costs: Sequence[float]) -> bool:
    """Whether guesses pay if all of them are right."""
    return worthwhile(1.0, costs) > 0
