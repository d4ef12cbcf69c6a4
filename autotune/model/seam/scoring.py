"""What a call's logits processors make of a token's logits, without what transformers' own ones cost on a CPU.

Top-p sorts the whole vocabulary: 3.9 ms for 49 152 tokens, as long as a decode step. What it keeps is known from the
likeliest tokens alone: a token stays if those before it have less than `top_p` together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy
import torch

from .relays import innermost, observed

LIKELIEST = 1024  # tokens that are looked at; where they do not reach, everything is sorted
OURS, THEIRS = 2e-7, 3e-6  # twice what FP32 exponentials may change of a sum of probabilities, as a share of it

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def scoring(processors: Any, prompt_tokens: int) -> Score | None:
    """What is to be called with ids [B, T] and logits [B, V] for the scores [B, V] that a token is chosen by.

    Args:
        processors: of a call; its top-p is exchanged for a faster one with the same result.
        prompt_tokens: length of the call's prompts.

    Returns:
        None if the logits are the scores.
    """
    from transformers import LogitsProcessorList

    _exchange(innermost(processors))
    found = observed(processors)
    if getattr(found, "relay", None) is not None:
        return processors  # type: ignore[no-any-return]
    active = [each for each in found if not _is_idle(each, prompt_tokens)]
    if not active:
        return None
    if type(found) is not LogitsProcessorList or not all(type(each) in _plain() for each in active):
        return processors  # type: ignore[no-any-return]

    def score(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for each in active:  # the list would look at the signature of each
            scores = each(ids, scores)
        return scores

    return score


def _exchange(processors: Any) -> None:
    from transformers.generation.logits_process import TopPLogitsWarper

    for i, each in enumerate(processors):
        if type(each) is TopPLogitsWarper:
            processors[i] = _fast_top_p()(each.top_p, each.filter_value, each.min_tokens_to_keep)


def _is_idle(processor: Any, prompt_tokens: int) -> bool:
    """Whether a logits processor changes nothing. `min_new_tokens=0` makes one that watches the prompt's length."""
    from transformers.generation.logits_process import MinLengthLogitsProcessor

    return type(processor) is MinLengthLogitsProcessor and processor.min_length <= prompt_tokens


@cache
def _plain() -> frozenset[type]:
    """Processors that are called with ids and scores, and raise nothing."""
    from transformers.generation.logits_process import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper

    return frozenset((TemperatureLogitsWarper, TopKLogitsWarper, _fast_top_p(), MinPLogitsWarper))


@cache
def _fast_top_p() -> type:
    """A class like transformers' top-p; that itself if a release computes something else."""
    from transformers.generation.logits_process import TopPLogitsWarper

    def call(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        least = least_kept(scores, self.top_p, self.min_tokens_to_keep)
        if least is None:
            return TopPLogitsWarper.__call__(self, input_ids, scores)  # type: ignore[no-any-return]
        return scores.masked_fill(scores < least, self.filter_value)

    name = TopPLogitsWarper.__name__
    fast = type(name, (TopPLogitsWarper,), {"__call__": call, "__module__": TopPLogitsWarper.__module__})
    chance = torch.Generator("cpu").manual_seed(0)
    trial = 4 * torch.randn(4, 2 * LIKELIEST, generator=chance, dtype=torch.float32, device="cpu")
    ids = torch.zeros(4, 1, dtype=torch.int64, device="cpu")
    agrees = all(torch.equal(fast(p)(ids, trial), TopPLogitsWarper(p)(ids, trial)) for p in (0.1, 0.5, 0.9))
    return fast if agrees else TopPLogitsWarper


def least_kept(scores: torch.Tensor, top_p: float, least: int) -> torch.Tensor | None:
    """The lowest score [B, 1] that top-p keeps in each row of scores [B, V] in the CPU's memory.

    Args:
        top_p: tokens stay until they have so much together.
        least: how many stay at least.

    Returns:
        None if that is to be found in another way: on another device, where the likeliest tokens are too few, or where
        they come so near to `top_p` that rounding decides.
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return None
    count = min(LIKELIEST, scores.shape[-1])
    top = scores.topk(count, dim=-1).values
    best = top[:, :1]
    if not bool(best.isfinite().all()):
        return None
    total = (scores - best).exp_().numpy().sum(-1, dtype=numpy.float64, keepdims=True)
    chances = (top - best).numpy().astype(numpy.float64)
    numpy.exp(chances, out=chances)
    chances /= total
    before = chances.cumsum(-1) - chances  # what the likelier ones have together
    kept = numpy.maximum((before < top_p).sum(-1), least)
    if (kept >= count).any():
        return None
    rows = numpy.arange(len(kept))
    doubt = OURS * top_p + THEIRS * (1 - top_p)  # the sort adds up from the least likely token on
    in_doubt = numpy.abs(before[rows, [kept - 1, kept]] - top_p) < doubt
    values = top.numpy()
    if in_doubt.any() or (values[rows, kept - 1] == values[rows, kept]).any():
        return None
    return torch.from_numpy(values[rows, kept - 1, None])
