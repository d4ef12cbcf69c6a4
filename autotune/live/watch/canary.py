"""What is kept of a served call, and how it is scored again."""

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

TOKENS = 16  # of a kept call that are scored again
LONGEST = 1024  # a kept call's prompt; reading a longer one again takes too long


@dataclass(frozen=True)
class Sample:
    """A served call to be scored again: prompt and the first tokens of its answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @classmethod
    def of(cls, call: Sampling, result: Any) -> Sample | None:
        """The first sequence of a call and of what it returned; None where that is too long, or nothing."""
        ids, given = seam.sequences(result), call.input_ids
        mask = call.mask
        prompt = given[0] if mask is None or mask.shape != given.shape else given[0][mask[0].bool()]
        answer = ids[0, given.shape[1] : given.shape[1] + TOKENS]
        if not 0 < len(prompt) <= LONGEST or not len(answer):
            return None
        return cls(tuple(prompt.tolist()), tuple(answer.tolist()))


def score(variant: Variant, sample: Sample, original: Variant | None) -> tuple[float | None, str | None]:
    """Mean KL divergence of a served call's tokens from the original, nats, and what is plainly broken.

    Args:
        variant: the plan, whose decoding is stepped through the answer.
        sample: prompt and answer.
        original: what to compare with; without it only broken logits are seen.

    Raises:
        CandidateError: the plan raised.
    """
    from ...validate.divergence import compare_logits, find_defect
    from ...validate.score import BypassedError, Served

    served = Served(variant, pad_token_id=0, fall_back=False)  # one sequence: nothing is padded
    try:
        logits = served.step([sample.prompt], [sample.answer])  # [1, T, V]
    except BypassedError:
        return None, None  # the original would serve it
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
    """Graphs that torch compiled in this process so far; 0 where it never compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
