"""Several short prompts computed in one forward, one after the other along the sequence.

A forward over a short prompt spends half of its time on laying out weights, which several prompts share. No prompt
sees the others, and kernels that sum row by row give each one the numbers that it has alone. Whether they do is tried
before it is relied on (`is_exact`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch.nn.functional import pad

from ...machine import outside
from ...model import configured, seam

if TYPE_CHECKING:
    from ..variant import Variant
    from .request import Request

log = logging.getLogger("autotune")

# Every prompt begins at a multiple of so many tokens, because kernels take queries and keys in such blocks and sum
# block by block.
SIDE = 16
SHORTEST = 32  # tokens; kernels for few rows multiply shorter prompts (`kernels.bf16.FEW`)


def count(lengths: Sequence[int], room: int, longest: int) -> int:
    """How many of the prompts that wait are computed together: the first, and those after it that fit.

    Args:
        lengths: tokens of each, in the order in which they are served.
        room: most tokens of all together.
        longest: most tokens of each.
    """
    fitting = 0
    for length in lengths:
        room -= length
        if room < 0 or not SHORTEST <= length <= longest:
            break
        fitting += 1
    return max(1, fitting)


def together(
    order: Sequence[Request], room: int, longest: int, is_known: Callable[[tuple[int, ...]], bool]
) -> list[Request]:
    """The requests whose prompts are computed together. A prompt like an earlier one is found once that is computed.

    Args:
        order: the requests that wait, in the order in which they are served.
        room, longest: as for `count`.
        is_known: whether a prompt need not be computed.
    """
    first, *others = order
    if is_known(first.prompt):
        return [first]
    unlike = {first.prompt: first}
    for request in others:
        if not is_known(request.prompt):
            unlike.setdefault(request.prompt, request)
    found = list(unlike.values())
    return found[: count([len(each.prompt) for each in found], room, longest)]


class Prefilled(NamedTuple):
    """A prompt that was computed.

    Args:
        logits: of its last token, [1, V].
        cache: its keys and values [1, Hk, P, D] per layer.
    """

    request: Request
    logits: torch.Tensor
    cache: Any


class Joined:
    """Requests whose prompts are computed in one forward."""

    is_known: ClassVar[bool] = False

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)

    def advance(self, variant: Variant, most: int) -> list[Prefilled]:
        """Compute all of them, however many tokens they are: `together` chose them."""
        calls = [request.call for request in self.requests]
        found = read(variant, [(call.input_ids, call.positions) for call in calls])
        return [Prefilled(request, *result) for request, result in zip(self.requests, found, strict=True)]


def read(variant: Variant, prompts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, Any]]:
    """Compute prompts in one forward of prefill's module.

    Args:
        prompts: ids and positions, both [1, P], of each.

    Returns:
        The last token's logits [1, V] and a cache for each prompt.
    """
    lengths = [ids.shape[1] for ids, _ in prompts]
    widths = [-(-length // SIDE) * SIDE for length in lengths]
    begins = [sum(widths[:k]) for k in range(len(widths))]
    ids, positions = (
        torch.cat([pad(part, (0, width - part.shape[1])) for part, width in zip(parts, widths, strict=True)], 1)
        for parts in zip(*prompts, strict=True)
    )
    own = torch.repeat_interleave(
        torch.tensor(widths, dtype=torch.int64, device=ids.device)
    )  # [T], the prompt that each token is of
    mask = (own[:, None] == own).tril()[None, None]
    ends = [begin + length - 1 for begin, length in zip(begins, lengths, strict=True)]
    last = torch.tensor(ends, dtype=torch.int64, device=ids.device)
    cache = seam.growing_cache()
    with variant.running("prefill") as module:
        output = module(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            return_dict=True,
            **seam.logits_at(variant.original, last),
            **seam.over(variant.original, cache),
        )
    logits = seam.logits(output)[0]
    logits = logits if len(logits) == len(prompts) else logits[last]
    held = seam.keys_and_values(cache)
    return [
        (logits[k : k + 1], _part(held, slice(begin, begin + length)))
        for k, (begin, length) in enumerate(zip(begins, lengths, strict=True))
    ]


def _part(held: list[tuple[torch.Tensor, torch.Tensor]], tokens: slice) -> Any:
    """A cache of some of the tokens."""
    cache = seam.growing_cache()
    for layer, (keys, values) in enumerate(held):
        cache.update(keys[:, :, tokens], values[:, :, tokens], layer)
    return cache


def tried(trial: Callable[[Variant, int], bool]) -> Callable[[Variant, int], bool]:
    """A trial of a variant that has no gradients, and fails if it raises: a model's own code may refuse a mask."""

    @wraps(trial)
    @torch.no_grad()
    def trying(variant: Variant, tokens: int) -> bool:
        try:
            return trial(variant, tokens)
        except Exception as error:
            outside.pass_on(error)
            log.debug("%s failed", trial.__name__, exc_info=True)
            return False

    return trying


@tried
def is_exact(variant: Variant, longest: int) -> bool:
    """Whether prompts that are computed together get the same numbers, to the bit, as each alone.

    Args:
        longest: tokens of the longest prompt that is computed together with others.
    """
    vocabulary = configured.vocabulary(variant.original)
    draw = torch.Generator(device="cpu").manual_seed(0)
    prompts = []
    for length in (longest, SHORTEST, SHORTEST + SIDE // 2 + 1):
        ids = torch.randint(vocabulary, (1, length), generator=draw, dtype=torch.int64, device="cpu")
        ids = ids.to(variant.original.device)
        prompts.append((ids, torch.arange(length, dtype=torch.int64, device=ids.device)[None]))
    for together, prompt in zip(read(variant, prompts), prompts, strict=True):
        cache = seam.growing_cache()
        with variant.running("prefill") as module:
            output = module(
                input_ids=prompt[0],
                position_ids=prompt[1],
                attention_mask=torch.ones_like(prompt[0]),
                return_dict=True,
                **seam.last_logits(variant.original, 1),
                **seam.over(variant.original, cache),
            )
        if not is_same(together, (seam.logits(output)[:, -1], cache)):
            return False
    return True


def is_same(one: tuple[torch.Tensor, Any], other: tuple[torch.Tensor, Any]) -> bool:
    pairs = zip(seam.keys_and_values(one[1]), seam.keys_and_values(other[1]), strict=True)
    return torch.equal(one[0], other[0]) and all(
        torch.equal(a, b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)
    )
