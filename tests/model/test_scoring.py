"""Scores that tokens are drawn from: the same as transformers' own processors give, or theirs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from autotune.model import seam
from autotune.model.seam import scoring

IDS = torch.ones(3, 4, dtype=torch.int64)
VOCABULARY = 6 * scoring.LIKELIEST


def logits(spread: float, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return spread * torch.randn(3, vocabulary, generator=chance)


def call(*processors: Any) -> seam.Sampling:
    options = {"logits_processor": LogitsProcessorList(processors), "stopping_criteria": StoppingCriteriaList()}
    return seam.Sampling(None, IDS, options, {})


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("spread", [1.5, 3.0, 6.0, 12.0])
def test_top_p_keeps_what_a_sorted_vocabulary_keeps(spread: float, top_p: float) -> None:
    within, known = 0, 0
    for row in torch.cat([logits(spread, seed) for seed in range(30)]).split(1):
        kept = TopPLogitsWarper(top_p)(IDS[:1], row)
        found = scoring.least_kept(row, top_p, 1)
        within += int(kept.isfinite().sum()) < scoring.LIKELIEST
        if found is not None:
            known += 1
            assert torch.equal(row.masked_fill(row < found, -torch.inf), kept)
    assert 0.9 * within <= known <= within  # of the rest, rounding decides


CHAINS: dict[str, list[Any]] = {
    "temperature": [TemperatureLogitsWarper(0.7)],
    "top-p": [TopPLogitsWarper(0.9)],
    "at least five": [TopPLogitsWarper(0.01, min_tokens_to_keep=5)],
    "another filler": [TopPLogitsWarper(0.9, filter_value=-1e4)],
    "all that generate makes": [
        TemperatureLogitsWarper(1.3),
        TopKLogitsWarper(50),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.05),
    ],
}


@pytest.mark.parametrize("vocabulary", [40, VOCABULARY])
@pytest.mark.parametrize("name", CHAINS)
def test_scores_are_those_of_transformers(name: str, vocabulary: int) -> None:
    if vocabulary < 50:
        CHAINS["all that generate makes"][1] = TopKLogitsWarper(30)
    given = logits(5.0, vocabulary=vocabulary)
    expected = LogitsProcessorList(CHAINS[name])(IDS, given)
    scored = call(*CHAINS[name]).scoring()
    assert scored is not None
    with mock.patch.object(LogitsProcessorList, "__call__", side_effect=AssertionError("the list was called")):
        assert torch.equal(scored(IDS, given), expected)


def test_nothing_is_sorted() -> None:
    scored = call(TopPLogitsWarper(0.9)).scoring()
    assert scored is not None
    with mock.patch.object(torch, "sort", side_effect=AssertionError("it was sorted")):
        assert scored(IDS, logits(5.0)).isfinite().any()


@pytest.mark.parametrize(
    ("given", "top_p"),
    [
        (torch.zeros(1, 8), 0.5),  # ties, of which the order of the sort decides
        (torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.5),  # the likeliest one has exactly as much
        (torch.zeros(1, VOCABULARY), 0.9),
        (torch.tensor([[1.0, torch.nan, 0.0]]), 0.9),
        (torch.tensor([[1.0, torch.inf, 0.0]]), 0.9),
        (torch.zeros(1, 8, dtype=torch.float64), 0.9),
    ],
)
def test_what_rounding_decides_is_left_to_the_sort(given: torch.Tensor, top_p: float) -> None:
    assert scoring.least_kept(given, top_p, 1) is None
    own = call(TopPLogitsWarper(top_p)).scoring()
    assert own is not None
    assert torch.equal(own(IDS, given).isfinite(), TopPLogitsWarper(top_p)(IDS, given).isfinite())


def test_other_processors_are_called_by_the_list_with_the_faster_top_p() -> None:
    own = NoRepeatNGramLogitsProcessor(2)
    given = call(own, TopPLogitsWarper(0.9))
    expected = LogitsProcessorList([own, TopPLogitsWarper(0.9)])(IDS, logits(5.0))
    scored = given.scoring()
    assert scored is given.processors
    assert isinstance(given.processors[1], TopPLogitsWarper)
    assert type(given.processors[1]) is not TopPLogitsWarper
    assert not seam.remembers(
        call(given.processors[1]).through(lambda own, *args: own(*args), lambda own, *args: own(*args))
    )
    with mock.patch.object(torch, "sort", side_effect=AssertionError("it was sorted")):
        assert torch.equal(scored(IDS, logits(5.0)), expected)


def test_a_release_with_another_top_p_keeps_its_own() -> None:
    def other(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores

    scoring._fast_top_p.cache_clear()
    try:
        with mock.patch.object(TopPLogitsWarper, "__call__", other):
            assert scoring._fast_top_p() is TopPLogitsWarper
    finally:
        scoring._fast_top_p.cache_clear()
    assert scoring._fast_top_p() is not TopPLogitsWarper
