"""The work to tune for: real prompts, how many tokens they ask for, and in what batches.

`read` makes a Workload from a caller's prompts. `Observer` makes one from the calls that a model serves.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median_high
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from ..errors import WorkloadError
from ..machine import forking
from . import prompts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, Phase] = ("prefill", "decode")
Target = Literal["prefill", "decode", "both"]  # what to speed up: one phase, or whole requests
Metric = Literal["ttft", "tpot", "end_to_end"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "end_to_end")
METRIC_OF: Mapping[Target, Metric] = {"prefill": "ttft", "decode": "tpot", "both": "end_to_end"}

OBSERVED_PROMPTS = 64  # prompts that an observer keeps; enough for the standard quality verdict
OBSERVED_BATCHES = 3  # most frequent batch sizes in an observed workload; each is timed separately


@dataclass(frozen=True)
class Bucket:
    """One shape of work that is timed and judged separately.

    Args:
        batch: sequences decoded together.
        prompt_tokens: prompt length in tokens.
        new_tokens: tokens generated per sequence.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def label(self) -> str:
        """Its name in records: "b1/p64/n32"."""
        return f"b{self.batch}/p{self.prompt_tokens}/n{self.new_tokens}"

    @classmethod
    def of(cls, label: str) -> Self:
        """The bucket of a label."""
        return cls(*(int(part[1:]) for part in label.split("/")))


def by_bucket(
    rows: Mapping[str, Mapping[str, Sequence[Any]]], labels: Sequence[str]
) -> dict[str, dict[str, dict[str, Sequence[Any]]]]:
    """Divide samples that earlier versions kept in one row, bucket by bucket, equally many of each.

    Args:
        rows: the row by arm and metric.
        labels: of the buckets, in the row's order.

    Returns:
        Each bucket's samples by label, arm and metric.
    """

    def part(row: Sequence[Any], number: int) -> Sequence[Any]:
        each = len(row) // len(labels)
        return row[number * each : (number + 1) * each]

    return {
        label: {arm: {metric: part(row, k) for metric, row in found.items()} for arm, found in rows.items()}
        for k, label in enumerate(labels)
    }


@dataclass(frozen=True)
class Workload:
    """What the model is asked to do.

    Args:
        prompts: token ids, one tuple per prompt.
        new_tokens: tokens generated per prompt.
        batch_sizes: sequences generated together; each size is a separate bucket.
    """

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1,)

    def buckets(self) -> tuple[Bucket, ...]:
        """Every batch size at the median prompt length, and at the longest if it exceeds twice the median."""
        lengths = [len(prompt) for prompt in self.prompts]
        typical, longest = median_high(lengths), max(lengths)
        shapes = (typical, longest) if longest > 2 * typical else (typical,)
        return tuple(Bucket(b, length, self.new_tokens) for b in self.batch_sizes for length in shapes)

    def split(self, holdout: float = 0.25, seed: int = 0) -> tuple[Workload, Workload]:
        """Split into two workloads of similar lengths, to tune on and to confirm on. Equal prompts stay on one side.

        Args:
            holdout: share of the distinct prompts to hold out, above 0 and below 1; at least one prompt is held out.
            seed: selects which prompts are held out.

        Returns:
            (tune, held out). With one distinct prompt nothing can be held out: both are the workload itself.
        """
        if not 0 < holdout < 1:
            raise WorkloadError(f"holdout is {holdout}; a share above 0 and below 1 was expected")
        distinct = sorted(set(self.prompts), key=lambda prompt: (len(prompt), prompt))
        if len(distinct) == 1:
            return self, self
        count = min(max(1, round(len(distinct) * holdout)), len(distinct) - 1)
        edges = [i * len(distinct) // count for i in range(count + 1)]
        chance = random.Random(seed)  # noqa: S311 - a reproducible draw, not a secret
        # one from each of `count` strata of neighbouring lengths
        held = {distinct[chance.randrange(low, high)] for low, high in pairwise(edges)}
        sides = [tuple(p for p in self.prompts if (p in held) is out) for out in (False, True)]
        return replace(self, prompts=sides[0]), replace(self, prompts=sides[1])

    def shape_key(self) -> str:
        """A stable hash of the shape, for fingerprints. Lengths are rounded to powers of two, so that another sample of
        the same traffic has the same key."""
        shape = [(b.batch, _magnitude(b.prompt_tokens), _magnitude(b.new_tokens)) for b in self.buckets()]
        return hashlib.blake2b(json.dumps(shape).encode(), digest_size=8).hexdigest()


def _magnitude(tokens: int) -> int:
    return round(math.log2(tokens))


def read(
    value: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: PreTrainedModel | None = None,
    new_tokens: int | None = None,
    batch_sizes: Iterable[int] | None = None,
) -> Workload:
    """Make a checked workload from a caller's prompts.

    Args:
        value: prompts as strings, lists of token ids, or tensors [P] or [N, P]; a Workload; or the path of a text file
            (one prompt a line) or of a .jsonl file whose objects have "prompt" (text or token ids).
        tokenizer: needed for text.
        model: if given, its vocabulary and context length are checked.
        new_tokens: tokens generated per prompt; default the Workload's own, or 64 (fewer if the context is too short).
        batch_sizes: sequences generated together; default the Workload's own, or 1.

    Raises:
        WorkloadError: a prompt or setting is wrong; the message says which, what was expected and what to do.
    """
    given = value if isinstance(value, Workload) else None
    ids = prompts.parse(given.prompts if given else value, tokenizer)
    config = model.config.get_text_config(decoder=True) if model is not None else None
    if new_tokens is None:
        new_tokens = given.new_tokens if given else _default_new_tokens(ids, config)
    if batch_sizes is None:
        batch_sizes = given.batch_sizes if given else (1,)
    (new_tokens,) = _counts("new_tokens", [new_tokens])
    workload = Workload(ids, new_tokens, tuple(sorted(set(_counts("batch_sizes", batch_sizes)))))
    _check(workload, config)
    return workload


def context_of(config: Any) -> int | None:
    """Tokens that a model of this text configuration was made for; None if it does not say, or says there is no limit.

    XLNet's says -1.
    """
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return found if isinstance(found, int) and found > 0 else None


def _default_new_tokens(ids: Sequence[Sequence[int]], config: PretrainedConfig | None) -> int:
    context = context_of(config)
    longest = max((len(prompt) for prompt in ids), default=0)
    return max(1, min(64, context - longest)) if context else 64


def _check(workload: Workload, config: PretrainedConfig | None) -> None:
    """Raise WorkloadError for the first prompt that the model could not take."""
    if not workload.prompts:
        raise WorkloadError("the workload is empty; at least one prompt was expected, 16 or more for a quality verdict")
    vocabulary = getattr(config, "vocab_size", None)
    context = context_of(config)
    for i, prompt in enumerate(workload.prompts):
        if not prompt:
            raise WorkloadError(f"prompt {i} is empty; at least one token was expected: drop it")
        wrong = next((t for t in prompt if t < 0 or (vocabulary is not None and t >= vocabulary)), None)
        if wrong is not None:
            below = f" below {vocabulary}, the model's vocabulary," if vocabulary is not None else " of 0 or more"
            raise WorkloadError(
                f"prompt {i} has token id {wrong}; ids{below} were expected: is it another tokenizer's?"
            )
        if context is not None and len(prompt) + workload.new_tokens > context:
            raise WorkloadError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room for {workload.new_tokens} new ones; "
                f"the model's context is {context}: shorten the prompt or ask for fewer new_tokens"
            )


def _counts(name: str, counts: Any) -> list[int]:
    found = list(counts) if isinstance(counts, Iterable) else [counts]
    if not found or not all(prompts.is_count(count) and count >= 1 for count in found):
        what = found[0] if len(found) == 1 else found
        raise WorkloadError(f"{name} is {what!r}; whole numbers of 1 or more were expected")
    return [int(count) for count in found]


class Observer:
    """Collects a Workload from the calls that a model serves. Thread-safe; holds at most 64 prompts.

    Args:
        context: the model's context length in tokens, or None where it has no limit.
    """

    def __init__(self, context: int | None = None) -> None:
        self._context = context
        self._lock = forking.lock()
        self._rows: deque[tuple[torch.Tensor, torch.Tensor | None]] = deque(
            maxlen=OBSERVED_PROMPTS
        )  # ids [P], mask [P]
        self._new_tokens: deque[int] = deque(maxlen=OBSERVED_PROMPTS)
        self._batches: Counter[int] = Counter()
        self._calls = 0

    def observe(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, max_new_tokens: int) -> None:
        """Note one call.

        A call that no workload can express is left out: no ids, nothing to generate, an odd mask, a prompt that fills
        the model's context.

        Nothing is read back from the device here, because the caller would have to wait.

        Args:
            input_ids: [B, P], padded or not.
            attention_mask: [B, P], 0 where padded, or None.
            max_new_tokens: tokens the call may generate.
        """
        if input_ids.dim() != 2 or not input_ids.numel() or max_new_tokens < 1:
            return
        if self._context is not None and input_ids.shape[1] >= self._context:
            return
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            return
        kept = input_ids[:OBSERVED_PROMPTS].detach().clone()  # [B, P]; the caller may reuse its tensor
        mask = None if attention_mask is None else attention_mask[:OBSERVED_PROMPTS].detach().to(torch.bool, copy=True)
        rows = kept.unbind()
        masks: Sequence[torch.Tensor | None] = [None] * len(rows) if mask is None else mask.unbind()
        with self._lock:
            self._rows.extend(zip(rows, masks, strict=True))
            self._new_tokens.append(max_new_tokens)
            self._batches[len(input_ids)] += 1
            self._calls += 1

    def ready(self, calls: int) -> bool:
        """Whether at least `calls` calls were noted."""
        return self._calls >= max(1, calls)

    def workload(self) -> Workload:
        """Make a workload of the latest prompts, the median of tokens requested and the most frequent batch sizes.

        A prompt that leaves no room for so many tokens is left out, unless none leaves it.

        Raises:
            WorkloadError: nothing usable was observed.
        """
        with self._lock:
            rows, new_tokens = list(self._rows), list(self._new_tokens)
            batches = [size for size, _ in self._batches.most_common(OBSERVED_BATCHES)]
        seen = [tuple((ids if mask is None else ids[mask]).tolist()) for ids, mask in rows]
        seen = [prompt for prompt in seen if prompt]
        if not seen:
            raise WorkloadError(
                "no call with a usable prompt was observed; generate something first, or pass workload="
            )
        asked, context = median_high(new_tokens), self._context or math.inf
        seen = [prompt for prompt in seen if len(prompt) + asked <= context] or seen
        room = context - max(map(len, seen))
        return Workload(tuple(seen), int(min(asked, room)), tuple(sorted(batches)))
