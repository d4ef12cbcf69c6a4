"""A recorded step: a token of every row, or several tokens of one sequence."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ....errors import VariantError
from ....machine import forking
from .given import ModuleCalls
from .kept import like
from .lower import lower
from .program import Program
from .trace import INPUTS, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...cache.rows import RowCache
    from ...cache.slots import SlotCache
    from ..step import Step
    from .kept import KeptSteps


class _Bound(NamedTuple):
    """A program over a cache.

    Args:
        inputs: the tensors at the addresses, which this keeps alive.
        logits: [rows, V], where a run writes them.
    """

    inputs: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    addresses: torch.Tensor


class RecordedStep:
    """The recorded step for one shape of cache.

    Args:
        module: the decode module.
        cache: an empty cache of that shape; the recording writes to it.
        kept: where the step may be found instead of being recorded, or None.
        is_shared: whether all rows use the keys and values of one.

    Raises:
        TransformError: the step cannot be recorded as a program.
    """

    def __init__(
        self, module: PreTrainedModel, cache: SlotCache, kept: KeptSteps | None = None, *, is_shared: bool = False
    ) -> None:
        rows = cache.shape[0]
        shared = range(INPUTS, INPUTS + len(cache.keys) + len(cache.values)) if is_shared else ()
        with torch.inference_mode(False):  # a step recorded in inference mode must also run outside it
            self.given = ModuleCalls(module, cache)
            self.token = torch.zeros(rows, 1, dtype=torch.int64, device="cpu")
            self.position = torch.zeros(rows, 1, dtype=torch.int64, device="cpu")
            inputs = like(self._inputs(cache.slot, cache.valid, cache.keys, cache.values), shared)
            lowered = None if kept is None else kept.find(module, inputs)
            self.program = Program(lowered or lower(trace(module, cache, self.given), rows, shared))
        self._token, self._position = self.token.numpy(), self.position.numpy()
        self.lock = forking.lock()
        self._bound: weakref.WeakKeyDictionary[SlotCache, _Bound] = weakref.WeakKeyDictionary()

    def over(self, cache: SlotCache) -> Step:
        """The step of a token of every row of a cache."""
        if (bound := self._bound.get(cache)) is None:
            bound = self._bound[cache] = self.bound(cache.slot, cache.valid, cache.keys, cache.values)
        else:
            self.program.require_weights()

        def step(token: torch.Tensor, position: torch.Tensor, _cache: SlotCache) -> torch.Tensor:
            if token.shape != self.token.shape or position.shape != self.token.shape:
                shapes = f"{list(token.shape)} and {list(position.shape)}"
                raise VariantError(f"the step takes token and position {list(self.token.shape)}, not {shapes}")
            with self.lock:
                return self.run(token, position, bound)

        return step

    def bound(
        self, slot: torch.Tensor, valid: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> _Bound:
        """The program over these tensors."""
        inputs = self._inputs(slot, valid, keys, values)
        logits = self.program.room()
        return _Bound(inputs, logits, self.program.addresses(inputs, logits))

    def _inputs(
        self, slot: torch.Tensor, valid: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        return self.token, self.position, slot, valid, *keys, *values, *self.given.tensors

    def run(self, token: torch.Tensor, position: torch.Tensor, bound: _Bound) -> torch.Tensor:
        """token, position [rows, 1] -> logits [rows, V], which its next run overwrites. Call it with the lock."""
        self._token[:] = token.numpy()  # after a step, an operator takes twice as long
        self._position[:] = position.numpy()
        self.given.update(self.position)
        self.program.run(bound.addresses)
        return bound.logits


class TokensOfOne(RecordedStep):
    """A recorded step of several tokens of one sequence: a program of as many rows, over one row's keys and values.

    Every row has a slot of its own and sees the slots up to it. Threads meet after keys and values are written, before
    any of them attends. So each token's logits are, to the bit, those that a step of this token alone gives.

    Args:
        module: the decode module.
        cache: an empty cache with a row for each token; the recording writes to it.
        kept: where the step may be found instead of being recorded, or None.
    """

    def __init__(self, module: PreTrainedModel, cache: RowCache, kept: KeptSteps | None = None) -> None:
        super().__init__(module, cache, kept, is_shared=True)
        with torch.inference_mode(False):
            self.slot, self.valid = torch.zeros_like(cache.slot), torch.zeros_like(cache.valid)
            self.next = torch.arange(len(self.slot), dtype=torch.int64, device="cpu")

    @property
    def tokens(self) -> int:
        """How many tokens it takes."""
        return len(self.slot)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, cache: SlotCache) -> torch.Tensor:
        """tokens, positions [1, K] -> logits [1, K, V], as `cache.slot_forward.steps` gives them."""
        with self.lock:
            if (bound := self._bound.get(cache)) is None:
                whole = [[held.expand(self.tokens, -1, -1, -1) for held in each] for each in (cache.keys, cache.values)]
                bound = self._bound[cache] = self.bound(self.slot, self.valid, *whole)
            torch.add(cache.slot, self.next, out=self.slot)
            self.valid.copy_(cache.valid)
            return self.run(tokens.T, positions.T, bound)[None]
