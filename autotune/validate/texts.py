"""The texts of an exam, chosen and cut from prompts, and what an exam costs the original. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .tiers import Size

PADDED_BATCH = 8  # sequences in a padded batch
NOISE_TEXTS = 2  # texts that the original decodes token by token to measure its A/A noise
LONGEST_CONTEXT = 512  # tokens to which a prompt is cut; `long` makes separate texts for longer contexts
FEWEST_TOKENS = 0.5  # share of the size's tokens that must be there to be scored; with less, nothing passes

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """A context and the tokens scored after it.

    Args:
        prompt: number of the prompt it came from; the bounds resample by this number.
        context: tokens read at once.
        natural: the prompt's tokens after the context.
        own: tokens of the original's greedy continuation after the natural ones.
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
    """The work of the original in an exam.

    Args:
        read: tokens in full forwards.
        steps: decoding steps.
    """

    read: int
    steps: int

    def seconds(self, token_s: float, step_s: float) -> float:
        """Estimate the time from the seconds per token of a prompt and per decoding step."""
        return self.read * token_s + self.steps * step_s


def effort(size: Size, prompt_tokens: int) -> Effort:
    """Estimate the original's work in an exam over prompts of a usual length. A step of a large batch counts as one."""
    prompt = min(prompt_tokens, LONGEST_CONTEXT)
    read = size.prompts * (prompt + size.own) + size.prompts * prompt + sum(size.lengths)
    continued = -(-size.prompts // (2 * PADDED_BATCH)) * size.own
    return Effort(read, continued + NOISE_TEXTS * (size.natural + size.own))


def choose(prompts: Iterable[Sequence[int]], size: Size, limit: int, seed: int) -> tuple[Ids, ...]:
    """Choose as many different prompts as an exam of this size needs.

    Args:
        limit: tokens to which a prompt is cut.
        seed: of the choice, when there are more prompts than needed.

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
    """Return the part of each prompt that the original continues. Every second one ends at a power of two.

    Blocks and caches usually have such sizes, and these texts cross them.
    """
    return [p[: _end(p, size, cross=bool(k % 2))] for k, p in enumerate(prompts)]


def _end(prompt: Ids, size: Size, cross: bool) -> int:
    power = 1 << (len(prompt).bit_length() - 1)
    return power if cross and power >= 2 * size.natural else len(prompt)


def singles(prompts: Sequence[Ids], own: Sequence[Ids], size: Size) -> tuple[Text, ...]:
    """Make a text of each prompt; the end of its head and the original's continuation are scored.

    Args:
        own: the continuation of each head.
    """
    found = []
    for k, head in enumerate(heads(prompts, size)):
        start = max(1, len(head) - size.natural)
        found.append(Text(k, head[:start], head[start:], own[k]))
    return tuple(found)


def shortage(texts: Sequence[Text], size: Size) -> str | None:
    """Say why the texts of the prompts have too few tokens to score; None if they have enough."""
    tokens = sum(len(text.scored) for text in texts)
    if tokens >= FEWEST_TOKENS * size.tokens:
        return None
    missing = int(FEWEST_TOKENS * size.tokens) - tokens
    return f"{tokens} tokens to score: need {missing} more tokens, in longer prompts"


def padded(prompts: Sequence[Ids], size: Size) -> tuple[tuple[Text, ...], ...]:
    """Make batches in which equally many tokens are scored after contexts of different lengths."""
    steps = min(size.padded, sorted(map(len, prompts))[len(prompts) // 2] // 2)
    texts = []
    for k, p in enumerate(prompts):
        if len(p) > steps > 0:
            start = max(1, (len(p) - steps) * (k % 4 + 1) // 4)
            texts.append(Text(k, p[:start], p[start : start + steps], ()))
    batches = [tuple(texts[k : k + PADDED_BATCH]) for k in range(0, len(texts), PADDED_BATCH)]
    return tuple(b for b in batches if len(b) > 1)


def long(prompts: Sequence[Ids], size: Size, limit: int) -> tuple[Text, ...]:
    """Cut texts with long contexts from all prompts joined in a ring, each from another place in it.

    Half of the scored tokens are before the length in question, half after it.

    Args:
        limit: tokens of the model's longest context.
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
