"""Keeps part of a served call and scores it again later."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...model import seam

if TYPE_CHECKING:
    from ...model.seam import Sampling
    from ...runtime.variant import Variant

TOKENS = 16  # answer tokens of a kept call that are scored again
LONGEST = 1024  # tokens of the longest prompt that is kept; reading a longer one again takes too long


@dataclass(frozen=True)
class Sample:
    """A served call to score again: its prompt and the first tokens of its answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @classmethod
    def of(cls, call: Sampling, result: Any) -> Sample | None:
        """Keep the first sequence of a call and of its result. Returns None if one is empty or the prompt too long."""
        ids, given = seam.sequences(result), call.input_ids
        mask = call.mask
        prompt = given[0] if mask is None or mask.shape != given.shape else given[0][mask[0].bool()]
        answer = ids[0, given.shape[1] : given.shape[1] + TOKENS]
        if not 0 < len(prompt) <= LONGEST or not len(answer):
            return None
        return cls(tuple(prompt.tolist()), tuple(answer.tolist()))


def score(variant: Variant, sample: Sample, original: Variant | None) -> tuple[float | None, str | None] | None:
    """Score a served call: mean KL divergence of its tokens from the original, nats, and a defect, in words.

    Each of the two is None if it could not be measured or was not found. Returns None if the original would serve it.

    Args:
        variant: the plan. Its decoding is stepped through the answer.
        sample: prompt and answer.
        original: the original to compare with; without it only broken logits are found.

    Raises:
        CandidateError: the plan raised.
    """
    from ...validate.divergence import compare_logits, find_defect
    from ...validate.score import BypassedError, Served

    served = Served(variant, pad_token_id=0, fall_back=False)  # one sequence: nothing is padded
    try:
        logits = served.step([sample.prompt], [sample.answer])  # [1, T, V]
    except BypassedError:
        return None
    if original is None:
        sound = not bool(torch.isnan(logits).any()) and bool(torch.isfinite(logits).any(-1).all())
        return None, None if sound else "NaN or infinite logits"
    text = (sample.prompt + sample.answer)[:-1]
    expected = Served(original, pad_token_id=0).read(text, last=len(sample.answer))[None].float()
    if defect := find_defect(expected, logits):
        return None, defect
    targets = torch.tensor(sample.answer, dtype=torch.int64, device=logits.device)
    return float(np.mean(compare_logits(expected[0], logits[0], targets).kld)), None


def graphs() -> int:
    """Number of graphs that torch compiled in this process so far; 0 if it never compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
