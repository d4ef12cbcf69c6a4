"""Steps of several tokens over a static cache: captured if the device has graphs, recorded if the plain step is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..cache.slots import SlotCache
    from ..steps.graphs import GraphSteps
    from ..steps.program import StepPrograms
    from ..steps.program.recorded import TokensOfOne


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
        from ..cache import slot_forward

        if self.one is not None:
            return self.one.step(token, position, cache)
        return slot_forward.step(self.module, token, position, cache)

    def width(self, tokens: int, cache: SlotCache) -> int | None:
        """How many tokens the step that serves `tokens` computes; None: just these, by the module itself."""
        fixed = self._fixed(tokens, cache)
        return None if fixed is None else fixed.tokens

    def steps(self, tokens: torch.Tensor, positions: torch.Tensor, cache: SlotCache) -> torch.Tensor:
        """tokens, positions [1, N] -> logits [1, N, V]; see `autotune.runtime.cache.slot_forward.steps`.

        Graphs and programs take fixed numbers of tokens. Missing ones are filled up with the last token. The filling is
        written into slots after the valid tokens, which do not count. It takes no time in a step bound by reading
        weights.
        """
        from ..cache import slot_forward

        wanted = tokens.shape[1]
        if (fixed := self._fixed(wanted, cache)) is None:
            return slot_forward.steps(self.module, tokens, positions, cache)
        if missing := fixed.tokens - wanted:
            tokens, positions = (torch.cat([x, x[:, -1:].expand(-1, missing)], dim=1) for x in (tokens, positions))
        return fixed.step(tokens, positions, cache)[:, :wanted]

    def _fixed(self, tokens: int, cache: SlotCache) -> TokensOfOne | GraphSteps | None:
        """The program or the graphs for at least `tokens` tokens, for which the cache has room."""
        if self.recorded is not None and (program := self.recorded.several(tokens, cache)) is not None:
            return program
        graphs = self.several
        fits = graphs is not None and tokens <= graphs.tokens and cache.length + graphs.tokens <= cache.shape[1]
        return graphs if fits else None

    def forget(self) -> None:
        """Capture graphs anew, because addresses have changed. No request is under way."""
        for graphs in (self.one, self.several):
            if graphs is not None:
                graphs.forget()
