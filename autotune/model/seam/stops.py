"""When generate's loop ends a sequence, in plain numbers where its stopping criteria come to that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from .relays import observed


class OnLength:
    """A stopping criterion that looks at no token.

    Args:
        is_over: called with the number of tokens, prompt and answer together; whether generation ends.
    """

    def __init__(self, is_over: Callable[[int], bool]) -> None:
        self.is_over = is_over

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """[B] bool for ids [B, T]."""
        return ids.new_full(ids.shape[:1], self.is_over(ids.shape[1]), dtype=torch.bool)


class SequenceEnd(NamedTuple):
    """The end of a sequence.

    Args:
        longest: tokens of a finished sequence, prompt and answer together.
        ends: tokens that end one.
        others: further criteria, called with the number of tokens.
    """

    longest: float
    ends: frozenset[int]
    others: tuple[Callable[[int], bool], ...] = ()

    def after(self, length: int, token: int) -> bool:
        """Whether a sequence of `length` tokens that ends with `token` is finished."""
        return length >= self.longest or token in self.ends or any(is_over(length) for is_over in self.others)


def streamed(options: Mapping[str, Any], streamer: Any, is_over: Callable[[int], bool]) -> dict[str, Any]:
    """Arguments of `generate` with a streamer and one more stopping criterion.

    Args:
        is_over: as in `OnLength`.
    """
    from transformers import StoppingCriteriaList

    criteria = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), OnLength(is_over)])
    return {**options, "streamer": streamer, "stopping_criteria": criteria}


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
    longest, ends, others = float("inf"), set[int](), list[Callable[[int], bool]]()
    for each in criteria:
        if type(each) is MaxLengthCriteria and not _warns(each):
            longest = min(longest, each.max_length)
        elif type(each) is EosTokenCriteria:
            ends.update(each.eos_token_id.reshape(-1).tolist())
        elif type(each) is OnLength:
            others.append(each.is_over)
        else:
            return None
    while criteria is not given:
        given.told, given = told, given.objects
    return SequenceEnd(longest, frozenset(ends), tuple(others))


def _warns(criterion: Any) -> bool:
    """Whether a maximum length is beyond the model's context, of which the criterion warns."""
    context = criterion.max_position_embeddings
    return context is not None and criterion.max_length > context + 1
