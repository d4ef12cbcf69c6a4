"""An original's answers in an exam, as kept between runs, and checks that they fit an exam. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from .tiers import NEAR_TIE_NATS

MOST_NOISE = 0.05  # mean KL of an original from itself, in nats, above which no candidate is compared with it

Shape = tuple[int | None, ...]  # None stands for any size


@dataclass(frozen=True)
class Answers:
    """The original's answers, with which an exam is prepared without running the original.

    Args:
        own: the original's greedy continuation of each prompt.
        noise: `noise_kld` and `tie_nats` in nats, or None if the exam took them from another one.
        logits: float16 [B, T, V] by name of the group; the largest of every row is 0.
    """

    own: tuple[tuple[int, ...], ...]
    noise: tuple[float, ...] | None
    logits: Mapping[str, torch.Tensor]


def odd_texts(own: Sequence[Sequence[int]], count: int, longest: int, ends: Collection[int], width: int) -> str | None:
    """Say why these are not the continuations of `count` prompts; None if they are.

    Args:
        longest: tokens of a continuation that does not end with a token of `ends`.
        width: size of the vocabulary.
    """
    if len(own) != count:
        return f"{len(own)} continuations, expected {count}"
    for text in own:
        whole = 0 < len(text) <= longest and (len(text) == longest or text[-1] in ends)
        if not whole or any(t in ends for t in text[:-1]) or not all(0 <= t < width for t in text):
            return f"{list(text)} is not a continuation of at most {longest} tokens below {width}"
    return None


def odd_noise(noise: Sequence[float] | None) -> str | None:
    """Say why an exam cannot be used with this noise; None if it can."""
    if noise is None or (len(noise) == 2 and 0 <= noise[0] <= MOST_NOISE and NEAR_TIE_NATS <= noise[1] < math.inf):
        return None
    return f"a noise of {list(noise)} nats, expected up to {MOST_NOISE} and from {NEAR_TIE_NATS}"


def odd_logits(name: str, logits: torch.Tensor, shapes: Mapping[str, Shape]) -> str | None:
    """Say why these logits do not fit the group of this name; None if they do."""
    shape, found = shapes.get(name, ()), tuple(logits.shape)
    alike = len(found) == len(shape) and all(b in (None, a) for a, b in zip(found, shape, strict=True))
    if not alike or not logits.numel() or logits.dtype != torch.float16:
        return f"{name} is {logits.dtype} {list(found)}, expected torch.float16 {list(shape)}"
    if not bool((logits.amax(-1) == 0).all()):  # NaN is not 0 either
        return f"{name} has rows whose largest logit is not 0"
    return None
