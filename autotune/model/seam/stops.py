"""When generate's loop ends a sequence, in plain numbers where its stopping criteria come to that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .calls import observed

if TYPE_CHECKING:
    import torch


class SequenceEnd(NamedTuple):
    """The end of a sequence.

    Args:
        longest: tokens of a finished sequence, prompt and answer together.
        ends: tokens that end one.
    """

    longest: float
    ends: frozenset[int]

    def after(self, length: int, token: int) -> bool:
        """Whether a sequence is finished that has so many tokens with this one as its last."""
        return length >= self.longest or token in self.ends


class Told(Protocol):
    """What knows a call's tokens."""

    @property
    def ids(self) -> torch.Tensor:
        """Prompt and tokens so far, [B, T]."""


def stops(criteria: Any, told: Told) -> SequenceEnd | None:
    """What a list of stopping criteria comes to; None if it has to be called.

    Its call takes 50 to 150 us after a step, which has filled the processor's caches with weights.

    Args:
        criteria: the list.
        told: who decides in its place, and knows the tokens that those who observe its calls ask for.
    """
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

    given, criteria = criteria, observed(criteria)
    if type(criteria) is not StoppingCriteriaList:  # it may be called in another way
        return None
    longest, ends = float("inf"), set[int]()
    for each in criteria:
        if type(each) is MaxLengthCriteria and not _warns(each):
            longest = min(longest, each.max_length)
        elif type(each) is EosTokenCriteria:
            ends.update(each.eos_token_id.reshape(-1).tolist())
        else:
            return None
    while criteria is not given:
        given.told, given = told, given.objects
    return SequenceEnd(longest, frozenset(ends))


def _warns(criterion: Any) -> bool:
    """Whether a maximum length is beyond the model's context, of which the criterion warns."""
    context = criterion.max_position_embeddings
    return context is not None and criterion.max_length > context + 1
