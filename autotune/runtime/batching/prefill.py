"""A prompt that the engine computes part by part, between decode steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...model import seam
from .joined import Prefilled

if TYPE_CHECKING:
    from ..variant import Variant
    from .prefixes import Prefixes
    from .request import Request


class Prefill:
    """A prompt under way, part by part. The parts do not depend on what else runs, so neither does the result."""

    def __init__(self, request: Request, prefixes: Prefixes) -> None:
        self.request = request
        self.requests = [request]
        self.cache = seam.growing_cache()  # no configuration: every layer at full length
        self.prefixes = prefixes
        self.prompt: list[int] = request.ids[0].tolist()
        self.done = prefixes.fill(self.cache, self.prompt)

    def advance(self, variant: Variant) -> list[Prefilled] | None:
        """Compute the next part. Returns the prompt when it was the last part, else None."""
        call, tokens = self.request.call, len(self.prompt)
        with variant.running("prefill") as module:
            if tokens <= self.prefixes.part:
                found = module(**call.prompt(self.cache))
                return [Prefilled(self.request, seam.logits(found)[:, -1], self.cache)]
            part = slice(self.done, min(self.done + self.prefixes.part, tokens))
            given: dict[str, Any] = {"input_ids": call.input_ids[:, part], "position_ids": call.positions[:, part]}
            given |= seam.last_logits(variant.original, 1)
            found = module(**given, **seam.over(variant.original, self.cache))
        self.done = part.stop
        if self.done < tokens:
            self.prefixes.keep(self.cache, self.prompt, self.done)
            return None
        return [Prefilled(self.request, seam.logits(found)[:, -1], self.cache)]
