"""What stopping criteria come to: the same answers as the list gives, or none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation.logits_process import MinLengthLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from autotune.model import seam

TOLD: Any = SimpleNamespace(ids=torch.zeros(1, 3, dtype=torch.int64))


class Own(EosTokenCriteria):
    """A criterion of the caller's."""


PLAIN: dict[str, list[Any]] = {
    "nothing": [],
    "a length": [MaxLengthCriteria(6)],
    "lengths": [MaxLengthCriteria(9), MaxLengthCriteria(5, max_position_embeddings=4)],
    "a token": [EosTokenCriteria(3)],
    "a request's terms": seam.streamed({}, None, lambda length: length == 4)["stopping_criteria"],
    "them and the caller's": seam.streamed(
        {"stopping_criteria": [EosTokenCriteria(3)]}, None, lambda length: length > 7
    )["stopping_criteria"],
    "tokens and a length": [EosTokenCriteria([2, 7]), MaxLengthCriteria(7), EosTokenCriteria(torch.tensor([5]))],
}
CALLED: dict[str, list[Any]] = {
    "a warning": [MaxLengthCriteria(6, max_position_embeddings=4)],
    "a clock": [MaxLengthCriteria(6), MaxTimeCriteria(60.0)],
    "the caller's": [Own(3)],
    "a function": [lambda ids, scores: ids[:, -1] == 3],
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_criteria_are_finished_where_the_list_says_so(name: str) -> None:
    criteria = StoppingCriteriaList(PLAIN[name])
    found = seam.stops(criteria, TOLD)
    assert found is not None
    for length in range(1, 10):
        for token in range(9):
            ids = torch.full((1, length), token)
            assert found.after(length, token) == bool(criteria(ids, None).all())


@pytest.mark.parametrize("name", CALLED)
def test_other_criteria_are_called(name: str) -> None:
    assert seam.stops(StoppingCriteriaList(CALLED[name]), TOLD) is None


def test_a_list_with_a_call_of_its_own_is_called() -> None:
    class Last(StoppingCriteriaList):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids[:, -1] == 3

    assert seam.stops(Last([MaxLengthCriteria(6)]), TOLD) is None


def call(*criteria: Any) -> seam.Sampling:
    options = {"logits_processor": [], "stopping_criteria": StoppingCriteriaList(criteria)}
    return seam.Sampling(None, torch.zeros(1, 3, dtype=torch.int64), options, {})


def test_who_only_observes_is_left_out_and_told_of_the_tokens() -> None:
    given = call(MaxLengthCriteria(6))
    observed = given.through(lambda own, *args: own(*args), lambda own, *args: own(*args), is_transparent=True)
    twice = observed.through(lambda own, *args: own(*args), lambda own, *args: own(*args), is_transparent=True)
    assert seam.stops(twice.criteria, TOLD) == seam.SequenceEnd(6, frozenset())
    assert twice.criteria.told is TOLD
    assert observed.criteria.told is TOLD
    assert twice.scoring() is None


@pytest.mark.parametrize(("least", "processes"), [(3, False), (4, True)])
def test_a_length_that_the_prompt_has_keeps_nobody_waiting(least: int, processes: bool) -> None:
    given = call()
    given.processors.append(MinLengthLogitsProcessor(least, 2, device="cpu"))
    watched = given.through(lambda own, *args: own(*args), is_transparent=True)
    assert (given.scoring() is not None) == (watched.scoring() is not None) == processes


def test_who_decides_is_called() -> None:
    forced = call(MaxLengthCriteria(6)).through(lambda own, *args: own(*args), lambda own, *args: own(*args))
    observed = forced.through(lambda own, *args: own(*args), lambda own, *args: own(*args), is_transparent=True)
    assert seam.stops(observed.criteria, TOLD) is None
    assert observed.criteria.told is None
    assert observed.scoring() is observed.processors
