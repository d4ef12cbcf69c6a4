"""Whether two greedy answers to one prompt differ by no more than rounding.

A GPU's libraries choose kernels by the number of rows, and these sum in different orders. So a token that is as good as
another may come out differently beside others, after which two answers have nothing in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model import seam
from ..runtime.variant import Variant
from ..validate.quality import parted


@torch.no_grad()
def is_tie(variant: Variant, prompt: Sequence[int], one: Sequence[int], other: Sequence[int], nats: float) -> bool:
    """Whether the first tokens in which two answers of a variant differ are within so many nats of each other."""
    if (after := parted(one, other)) is None:
        return len(one) == len(other)
    ids = torch.tensor([[*prompt, *one[:after]]], dtype=torch.int64, device=variant.original.device)
    with variant.running("decode") as module:
        given = seam.last_logits(variant.original, 1)
        logits = seam.logits(module(input_ids=ids, return_dict=True, use_cache=False, **given))[0, -1]
    chances = logits.float().log_softmax(-1)
    return abs(float(chances[one[after]]) - float(chances[other[after]])) <= nats
