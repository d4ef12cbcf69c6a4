"""Preparation between the steps of generate's loop, which some model classes extend; settings for the loop."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch

from .arguments import bare_class, cache_in, over
from .caches import cache_over

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREPARE = "prepare_inputs_for_generation"
log = logging.getLogger("autotune")


def drops_cache(model: PreTrainedModel, held: int, length: int) -> bool:
    """Whether a model's own preparation drops a cache of `held` tokens at `length` and computes all tokens again.

    Phi-3 does this when the context grows past the length that it was trained with. Beyond it, all tokens need other
    rotary frequencies, earlier tokens included.
    """
    prepare = getattr(bare_class(model), PREPARE)
    if inspect.unwrap(prepare) is inspect.unwrap(getattr(_base(), PREPARE)):
        return False
    every = torch.zeros(1, 1, dtype=torch.int64, device="cpu").expand(1, length)
    given: dict[str, Any] = {"attention_mask": every, "position_ids": every, **_one_more(length - 1)}
    try:
        prepared = prepare(model, every, **given, **over(model, _full(held)))
    except Exception:  # it needs more arguments than these; a real call raises its own error
        log.debug("%s could not be asked about %d tokens", type(model).__name__, length, exc_info=True)
        return False
    return cache_in(prepared) is None or prepared["input_ids"].shape[1] != 1


def greedy_settings(pad_token_id: int, eos_token_id: list[int] | None) -> Any:
    """A complete generation configuration for greedy decoding of one answer per prompt."""
    from transformers import GenerationConfig

    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, use_cache=True, pad_token_id=pad_token_id, eos_token_id=eos_token_id
    )


def _one_more(place: int) -> dict[str, Any]:
    """Arguments that request one token, at `place`."""
    if "next_sequence_length" in inspect.signature(getattr(_base(), PREPARE)).parameters:
        return {"next_sequence_length": 1}
    return {"cache_position": torch.tensor([place], dtype=torch.int64, device="cpu")}  # to 5.1


def _full(length: int) -> Any:
    """A cache that claims to hold `length` tokens."""
    return cache_over([_layers()(length)])


@functools.cache
def _layers() -> Any:
    from .layers import CacheLayer

    class Full(CacheLayer):  # type: ignore[no-untyped-call]
        def __init__(self, length: int) -> None:
            super().__init__()
            self.length = length
            self.is_initialized = True

        def filled(self) -> int:
            return self.length

    return Full


def _base() -> Any:
    from transformers import GenerationMixin

    return GenerationMixin
