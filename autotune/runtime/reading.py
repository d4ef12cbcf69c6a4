"""A prompt's forward through prefill's module: whole or, for a plan that bounds memory, in parts and in turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ..machine import forking
from ..machine.device import cpu
from ..model import seam
from . import kernels

if TYPE_CHECKING:
    import torch

    from ..model.seam import Sampling
    from .variant import Variant

MOST_KEPT = 4096  # tokens read at once, whose layouts a thread keeps: above, laying memory out anew costs 1 to 2 %

_reading = forking.free(threading.RLock())


def read(variant: Variant, call: Sampling, prompt: Any) -> torch.Tensor:
    """Compute a prompt.

    Args:
        prompt: an empty cache, which is filled.

    Returns:
        Logits [B, V] of the last tokens.
    """
    batch, tokens = call.input_ids.shape
    part = tokens if variant.part_tokens is None else max(1, variant.part_tokens // batch)
    with _in_turn() if part < tokens else nullcontext(), variant.running("prefill") as module:
        for start in range(0, tokens, part):
            found = module(**call.prompt(prompt, slice(start, min(start + part, tokens))))
        if part < tokens or batch * part > MOST_KEPT:
            kernels.free_kept()  # here, where as many threads compute as did for the prompt
        return seam.logits(found)[:, -1]


@contextmanager
def _in_turn() -> Iterator[None]:
    """Compute alone, and then give the blocks of freed activations back to the system.

    Prompts that were computed at the same time would all have their activations in memory. Each thread's malloc keeps
    what it freed.
    """
    with _reading:
        try:
            yield
        finally:
            cpu.give_back()
