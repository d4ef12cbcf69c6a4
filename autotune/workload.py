"""The work to tune for: real prompts, how many tokens they ask for, and in what batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, Phase] = ("prefill", "decode")


@dataclass(frozen=True)
class Bucket:
    """One shape of work that is timed and judged on its own.

    Args:
        batch: sequences decoded together.
        prompt_tokens: prompt length in tokens.
        new_tokens: tokens generated per sequence.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """What the model is asked to do.

    Args:
        prompts: token ids, one tuple a prompt.
        new_tokens: tokens generated per prompt.
        batch_sizes: sequences generated together; every size is a bucket of its own.
    """

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1,)
