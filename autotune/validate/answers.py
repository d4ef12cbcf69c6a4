"""What an original said in an exam, as it is kept between runs, and whether it fits an exam. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .tiers import NEAR_TIE_NATS

if TYPE_CHECKING:
    pass

MOST_NOISE = 0.05  # mean KL of an original from itself, nats, beyond which nothing is compared with it

Shape = tuple[int | None, ...]  # None: any


@dataclass(frozen=True)
class Answers:
    """With it, an exam is prepared without asking the original.

    Args:
        own: the original's greedy continuation of each prompt.
        noise: `noise_kld` and `tie_nats`, nats, or None where the exam took them from another one.
        logits: float16 [B, T, V] by what was asked; the largest of every row is 0.
    """

    own: tuple[tuple[int, ...], ...]
    noise: tuple[float, ...] | None
    logits: Mapping[str, torch.Tensor]


def odd_texts(own: Sequence[Sequence[int]], count: int, longest: int, ends: Collection[int], width: int) -> str | None:
    """Why these are not the continuations of `count` prompts, or None.

    Args:
        longest: tokens of a continuation that no token of `ends` ends.
        width: of the vocabulary.
    """
    if len(own) != count:
        return f"{len(own)} continuations, expected {count}"
    for text in own:
        whole = 0 < len(text) <= longest and (len(text) == longest or text[-1] in ends)
        if not whole or any(t in ends for t in text[:-1]) or not all(0 <= t < width for t in text):
            return f"{list(text)} is no continuation of up to {longest} tokens below {width}"
    return None


def odd_noise(noise: Sequence[float] | None) -> str | None:
    """Why this is no noise with which an exam is used, or None."""
    if noise is None or (len(noise) == 2 and 0 <= noise[0] <= MOST_NOISE and NEAR_TIE_NATS <= noise[1] < math.inf):
        return None
    return f"a noise of {list(noise)} nats, expected up to {MOST_NOISE} and from {NEAR_TIE_NATS}"


def odd_logits(name: str, logits: torch.Tensor, shapes: Mapping[str, Shape]) -> str | None:
    """Why these are not what was asked under `name`, or None."""
    shape, found = shapes.get(name, ()), tuple(logits.shape)
    alike = len(found) == len(shape) and all(b in (None, a) for a, b in zip(found, shape, strict=True))
    if not alike or not logits.numel() or logits.dtype != torch.float16:
        return f"{name} is {logits.dtype} {list(found)}, expected torch.float16 {list(shape)}"
    if not bool((logits.amax(-1) == 0).all()):  # NaN is not 0 either
        return f"{name} has rows whose largest logit is not 0"
    return None
