"""The seconds that a tune may take: exactly those given, or as many as a model of this size needs on this GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GrowingBudget:
    """A budget that grows with the model on a GPU. On a CPU it is `base_s`.

    A trial copies and compiles, which takes time by the model's size, and decodes with the original, which takes time
    by its time per token.

    Args:
        base_s: seconds for a small model.
        per_billion_s: seconds added for each 1e9 parameters.
        decode_steps: decode steps of the original whose time is added.
        most_s: the most seconds in all.
    """

    base_s: float
    per_billion_s: float
    decode_steps: float
    most_s: float

    def on_gpu(self, parameters: int, decode_s: float) -> float:
        """Seconds for a model on a GPU.

        Args:
            decode_s: seconds of a decode step of the original, as measured.
        """
        return min(self.most_s, self.base_s + self.per_billion_s * parameters / 1e9 + self.decode_steps * decode_s)

    def __str__(self) -> str:
        more = f"on a GPU {self.per_billion_s:.0f} s per 1e9 parameters and {self.decode_steps:.0f} decode steps more"
        return f"{self.base_s:.0f} s; {more}, at most {self.most_s:.0f} s"


def seconds_of(budget: float | GrowingBudget, device: str, parameters: int, decode_s: float) -> float:
    """Return a budget's seconds for a model on a device. Exact ones are returned as they are."""
    if not isinstance(budget, GrowingBudget):
        return budget
    return budget.base_s if device == "cpu" else budget.on_gpu(parameters, decode_s)


def least(budget: float | GrowingBudget) -> float:
    """Return the fewest seconds that a budget allows any model."""
    return budget.base_s if isinstance(budget, GrowingBudget) else budget


def known(budget: float | GrowingBudget, device: str) -> float | None:
    """Return a budget's seconds if they are known before the model was measured, else None."""
    return None if isinstance(budget, GrowingBudget) and device != "cpu" else least(budget)


def longest(budget: float | GrowingBudget, device: str) -> float:
    """Return the most seconds that a budget allows any model on a device."""
    if not isinstance(budget, GrowingBudget):
        return budget
    return budget.base_s if device == "cpu" else budget.most_s
