"""The texts of an exam: chosen and cut from prompts, and what asking the original about them takes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .tiers import Size

PADDED_BATCH = 8  # sequences in a padded batch
NOISE_TEXTS = 2  # texts that the original decodes itself to show its A/A noise, token by token
LONGEST_CONTEXT = 512  # a prompt is read up to here; longer contexts have texts of their own
FEWEST_TOKENS = 0.5  # share of the size's tokens without which nothing passes

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """A context and the tokens scored after it.

    Args:
        prompt: number of the prompt it came from, the cluster it counts in.
        context: tokens read at once.
        natural: tokens of the prompt itself that follow.
        own: tokens of the original's greedy continuation after those.
    """

    prompt: int
    context: Ids
    natural: Ids
    own: Ids

    @property
    def scored(self) -> Ids:
        return self.natural + self.own


@dataclass(frozen=True)
class Effort:
    """What an exam asks of the original.

    Args:
        read: tokens in full forwards.
        steps: decoding steps.
    """

    read: int
    steps: int

    def seconds(self, token_s: float, step_s: float) -> float:
        """At so many seconds for a token of a prompt and for a decoding step."""
        return self.read * token_s + self.steps * step_s


def effort(size: Size, prompt_tokens: int) -> Effort:
    """What an exam over prompts of a usual length asks of the original; long batches count as a step each."""
    prompt = min(prompt_tokens, LONGEST_CONTEXT)
    read = size.prompts * (prompt + size.own) + size.prompts * prompt + sum(size.lengths)
    continued = -(-size.prompts // (2 * PADDED_BATCH)) * size.own
    return Effort(read, continued + NOISE_TEXTS * (size.natural + size.own))


def choose(prompts: Iterable[Sequence[int]], size: Size, limit: int, seed: int) -> tuple[Ids, ...]:
    """Different prompts, as many as an exam of this size needs.

    Args:
        limit: tokens of a prompt that are read.
        seed: chooses among more than are needed.

    Raises:
        ValueError: there are too few; the message says how many more are needed.
    """
    cut = (ids[:limit] for ids in dict.fromkeys(tuple(map(int, p)) for p in prompts) if len(ids) >= 2)
    unique = list(dict.fromkeys(cut))
    if (missing := size.prompts - len(unique)) > 0:
        raise ValueError(f"{len(unique)} different prompts of 2 tokens or more: need {missing} more prompts")
    order = np.random.default_rng(seed).permutation(len(unique))[: size.prompts]
    return tuple(unique[k] for k in order)


def heads(prompts: Sequence[Ids], size: Size) -> list[Ids]:
    """What the original continues of each prompt: half of them end at a power of two.

    Their texts cross it, which is the usual size of blocks and caches.
    """
    return [p[: _end(p, size, cross=bool(k % 2))] for k, p in enumerate(prompts)]


def _end(prompt: Ids, size: Size, cross: bool) -> int:
    power = 1 << (len(prompt).bit_length() - 1)
    return power if cross and power >= 2 * size.natural else len(prompt)


def singles(prompts: Sequence[Ids], own: Sequence[Ids], size: Size) -> tuple[Text, ...]:
    """A text of each prompt: the end of its head, and the original's continuation.

    Args:
        own: the continuation of each head.
    """
    found = []
    for k, head in enumerate(heads(prompts, size)):
        start = max(1, len(head) - size.natural)
        found.append(Text(k, head[:start], head[start:], own[k]))
    return tuple(found)


def shortage(texts: Sequence[Text], size: Size) -> str | None:
    """Why there is too little to score in the texts of the prompts, or None."""
    tokens = sum(len(text.scored) for text in texts)
    if tokens >= FEWEST_TOKENS * size.tokens:
        return None
    missing = int(FEWEST_TOKENS * size.tokens) - tokens
    return f"{tokens} tokens to score: need {missing} more tokens, in longer prompts"


def padded(prompts: Sequence[Ids], size: Size) -> tuple[tuple[Text, ...], ...]:
    """Batches with equally many tokens scored after contexts of different lengths."""
    steps = min(size.padded, sorted(map(len, prompts))[len(prompts) // 2] // 2)
    texts = []
    for k, p in enumerate(prompts):
        if len(p) > steps > 0:
            start = max(1, (len(p) - steps) * (k % 4 + 1) // 4)
            texts.append(Text(k, p[:start], p[start : start + steps], ()))
    batches = [tuple(texts[k : k + PADDED_BATCH]) for k in range(0, len(texts), PADDED_BATCH)]
    return tuple(b for b in batches if len(b) > 1)


def long(prompts: Sequence[Ids], size: Size, limit: int) -> tuple[Text, ...]:
    """Texts of all prompts in a row, from a share of them on and around: scored about a context of each length.

    Args:
        limit: of the model's context.
    """
    joined = tuple(token for p in prompts for token in p)
    lengths = [n for n in size.lengths if n + size.natural <= len(joined) and n <= limit - size.natural]
    found, half = [], size.natural // 2
    for k, length in enumerate(lengths):
        begin = int(k / len(lengths) * len(joined))
        turned = joined[begin:] + joined[:begin]
        context, scored = turned[: length - half], turned[length - half : length + half]
        found.append(Text(len(prompts) + k, context, scored, ()))
    return tuple(found)
