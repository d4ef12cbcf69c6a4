"""Steps of several tokens over a static cache: captured if the device has graphs, recorded if the plain step is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...machine.device import Device
    from ..cache.slots import SlotCache
    from ..steps.graphs import GraphSteps
    from ..steps.program import StepPrograms


@dataclass(frozen=True)
class MultiTokenStep:
    """Steps of a module for one token of a sequence, or for several at once.

    Args:
        module: the module that computes.
        one, several: its captured steps of one token and of a fixed number of tokens; None to call the module.
        recorded: its recorded steps, some of them of several tokens; None to call the module.
    """

    module: PreTrainedModel
    one: GraphSteps | None = None
    several: GraphSteps | None = None
    recorded: StepPrograms | None = None

    def step(self, token: torch.Tensor, position: torch.Tensor, cache: SlotCache) -> torch.Tensor:
        """token, position [1, 1] -> logits [1, V]."""
        from ..cache import slots

        if self.one is not None:
            return self.one.step(token, position, cache)
        return slots.step(self.module, token, position, cache)

    def width(self, tokens: int, cache: SlotCache) -> int | None:
        """How many tokens a step computes that is asked for so many; None: just as many, by the module itself."""
        if self.recorded is not None and (program := self.recorded.several(tokens, cache)) is not None:
            return program.tokens
        fits = self.several is not None and tokens <= self.several.tokens <= cache.shape[1] - cache.length
        return self.several.tokens if fits and self.several is not None else None

    def steps(self, tokens: torch.Tensor, positions: torch.Tensor, cache: SlotCache) -> torch.Tensor:
        """tokens, positions [1, N] -> logits [1, N, V]; see `autotune.runtime.cache.slots.steps`.

        A graph takes a fixed number of tokens. Missing ones are filled up with the last token. The filling is written
        into slots after the valid tokens, which do not count. It takes no time in a step bound by reading weights.
        """
        from ..cache import slots

        wanted, graphs = tokens.shape[1], self.several
        if self.recorded is not None and (program := self.recorded.several(wanted, cache)) is not None:
            return program.steps(tokens, positions, cache)
        if graphs is None or wanted > graphs.tokens or cache.length + graphs.tokens > cache.shape[1]:
            return slots.steps(self.module, tokens, positions, cache)
        if missing := graphs.tokens - wanted:
            tokens, positions = (torch.cat([x, x[:, -1:].expand(-1, missing)], dim=1) for x in (tokens, positions))
        return graphs.step(tokens, positions, cache)[:, :wanted]

    def forget(self) -> None:
        """Drop graphs. They are captured again when needed."""
        for graphs in (self.one, self.several):
            if graphs is not None:
                graphs.forget()


def captured(module: PreTrainedModel, device: Device, reads: Sequence[int], tokens: int) -> MultiTokenStep:
    """Graphs of one and of `tokens` tokens for single sequences; `reads` are the lengths of `graphs.GraphSteps`."""
    from ..steps.graphs import GraphSteps

    one, several = (GraphSteps(module, device, (1,), reads, tokens=n) for n in (1, tokens))
    return MultiTokenStep(module, one, several)
