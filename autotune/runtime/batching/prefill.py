"""A prompt that the engine computes part by part, between decode steps."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ...model import configured, seam
from .joined import SHORTEST, SIDE, Prefilled, is_same, tried

if TYPE_CHECKING:
    from typing import Any

    from ..variant import Variant
    from .prefixes import Prefixes
    from .request import Request


class Prefill:
    """A prompt under way, part by part. Its numbers do not depend on what else runs.

    Attributes:
        done: tokens that were found or computed.
        is_known: whether all of them were found, so that nothing is computed.
    """

    def __init__(self, request: Request, prefixes: Prefixes) -> None:
        self.request = request
        self.requests = [request]
        self.cache = seam.growing_cache()  # no configuration: every layer at full length
        self.prefixes = prefixes
        self.done, self._logits = prefixes.fill(self.cache, request.prompt)

    @property
    def is_known(self) -> bool:
        return self._logits is not None

    def advance(self, variant: Variant, most: int) -> list[Prefilled] | None:
        """Compute the next part, or several in one forward. Returns the prompt when it is complete, else None.

        Args:
            most: as for `Prefixes.end_of`. The result does not depend on it if the engine passes more than one part
                only where `parts_agree`.
        """
        prompt = self.request.prompt
        if self._logits is not None:
            return [Prefilled(self.request, self._logits, self.cache)]
        begin, self.done = self.done, self.prefixes.end_of(self.done, len(prompt), most)
        logits = read(variant, self.request.call, self.cache, slice(begin, self.done))
        self.prefixes.keep(self.cache, prompt, begin, self.done)
        return [Prefilled(self.request, logits, self.cache)] if self.done == len(prompt) else None


def read(variant: Variant, call: seam.Sampling, cache: Any, part: slice) -> torch.Tensor:
    """Compute some tokens of a prompt; the cache holds those before them. Returns the last one's logits [1, V]."""
    with variant.running("prefill") as module:
        return seam.logits(module(**call.prompt(cache, part)))[:, -1]


@tried
def parts_agree(variant: Variant, part: int) -> bool:
    """Whether a prompt gets the same numbers, to the bit, in parts of so many tokens or less as in one forward."""
    tokens = 2 * part + SHORTEST
    ends = (part, 2 * part - SIDE, tokens)
    draw = torch.Generator(device="cpu").manual_seed(0)
    size = (1, tokens)
    ids = torch.randint(configured.vocabulary(variant.original), size, generator=draw, dtype=torch.int64, device="cpu")
    ids = ids.to(variant.original.device)
    given = {"attention_mask": torch.ones_like(ids), **seam.last_logits(variant.original, 1)}
    call = seam.Sampling(variant.original, ids, {}, given)
    whole, parts = seam.growing_cache(), seam.growing_cache()
    at_once = read(variant, call, whole, slice(0, tokens))
    for begin, end in pairwise((0, *ends)):
        logits = read(variant, call, parts, slice(begin, end))
    return is_same((at_once, whole), (logits, parts))
