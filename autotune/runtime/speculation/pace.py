"""How far to guess ahead, from what a step with guesses costs and how the guesses before fared. Pure.

Source of the formula: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FORGET = 0.9  # weight of what a guess showed after each later one: about the last ten count
HITS, TRIES = 2.0, 3.0  # what is assumed of guesses before there were any
LONGEST_REST = 64  # tokens without a guess, when guesses keep being wrong


def expected_tokens(acceptance: float, guesses: int) -> float:
    """Tokens that a step with so many guesses gives on average (Leviathan et al., equation 1).

    Args:
        acceptance: probability that a guess is right when those before it were, 0 to 1.
        guesses: tokens guessed.
    """
    if acceptance >= 1:
        return float(guesses + 1)
    return (1 - acceptance ** (guesses + 1)) / (1 - acceptance)


def worthwhile(acceptance: float, most: int, cost: float) -> int:
    """How many guesses give the most tokens per time; 0 where none do better than a plain step.

    Args:
        acceptance: as in `expected_tokens`.
        most: guesses there may be.
        cost: time of a step with `most` guesses, guessing included, in plain steps; in between it is interpolated.
    """

    def speedup(guesses: int) -> float:
        return expected_tokens(acceptance, guesses) / (1 + (cost - 1) * guesses / most)

    return max(range(most + 1), key=speedup)


@dataclass(frozen=True)
class GuessBudget:
    """How far to guess ahead, from how the guesses before fared. Where that does not pay, it rests, and twice as long
    each time that a single guess after the rest was wrong again.

    Args:
        most, cost: as in `worthwhile`.
        hits, tries: guesses that were right, and all that were decided, the latest weighing most.
        rest: tokens to go without a guess.
        next_rest: length of the next rest.
    """

    most: int
    cost: float
    hits: float = HITS
    tries: float = TRIES
    rest: int = 0
    next_rest: int = 1

    @property
    def guesses(self) -> int:
        """How many tokens to guess now."""
        if self.rest or not pays(self.most, self.cost):
            return 0
        return max(1, worthwhile(self.hits / self.tries, self.most, self.cost))

    def after(self, guessed: int, right: int) -> GuessBudget:
        """The budget after a step that accepted `right` of `guessed` tokens; after a wrong one none counts."""
        tries = right + (right < guessed)
        kept = FORGET**tries
        new = replace(self, hits=self.hits * kept + right, tries=self.tries * kept + tries)
        if worthwhile(new.hits / new.tries, self.most, self.cost):
            return replace(new, next_rest=1)
        return replace(new, rest=self.next_rest, next_rest=min(2 * self.next_rest, LONGEST_REST))

    def without(self) -> GuessBudget:
        """The pace after a token for which nothing was guessed."""
        return replace(self, rest=max(0, self.rest - 1))


def pays(most: int, cost: float) -> bool:
    """Whether guesses pay when every one of them is right."""
    return worthwhile(1.0, most, cost) > 0
