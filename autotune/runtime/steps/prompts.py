"""Short prompts as CUDA graphs that write keys and values straight into slots.

On a GPU a short prompt's operators take less time than their launches. A graph is captured for a few lengths; a prompt
is filled up to the next one. The tokens after it are computed in vain: the prompt's own do not see them, and decoding
overwrites their slots one by one.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from ..cache import slot_forward
from .graphs import GraphSteps

if TYPE_CHECKING:
    from ...model.seam import Sampling
    from ..cache.pool import CachePool
    from ..cache.slots import SlotCache


class PromptGraphs(GraphSteps):
    """Prompts of single sequences as graphs, by slot cache and length. A graph reads as many slots as it has tokens."""

    subject = "prefill"

    def room(self, call: Sampling, pool: CachePool, lent: ExitStack) -> SlotCache | None:
        """Lend a cache in whose slots `compute` may compute a call's prompt; None if it is to be computed elsewhere."""
        (batch, length), mask = call.input_ids.shape, call.mask
        if batch > 1 or length > self.lengths[-1] or not (mask is None or bool(mask.all())):
            return None
        cache = lent.enter_context(pool.lend_idle(1))
        if cache is not None:
            cache.begin_padded(length, self.covering(length))
        return cache

    def compute(self, call: Sampling, cache: SlotCache) -> torch.Tensor:
        """Compute a call's prompt in a cache from `room`. Returns its last logits, [1, V]."""
        missing = self.covering(cache.length + 1) - call.input_ids.shape[1]
        tokens, positions = (
            torch.cat([x, x[:, -1:].expand(-1, missing)], dim=1) for x in (call.input_ids, call.positions)
        )
        logits = self.step(tokens, positions, cache)
        cache.advance()
        return logits

    @torch.no_grad()
    def prepare(self, cache: SlotCache, read: int) -> None:
        if read in self._graphs.get(cache, {}) or (captured := self._captured(cache, read)) is None:
            return
        cache.begin_padded(read, read)  # slot, tokens and positions differ from the capture
        token = torch.ones(1, read, dtype=torch.int64, device=cache.slot.device)
        self._require_same(captured, token, token.cumsum(1) - 1, cache.first(read))

    def width(self, part: SlotCache) -> int:
        return part.shape[1]

    def _uncompiled(self, token: torch.Tensor, position: torch.Tensor, part: SlotCache) -> torch.Tensor:
        return slot_forward.prompt(self.module, token, position, part)
