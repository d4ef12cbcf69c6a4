"""Prompts read part by part, so that activations take memory for one part only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import ChoiceError, TransformError
from ..model import seam
from ..runtime.loop import decode
from ..runtime.variant import Stage, Transform

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

REHEARSED_TOKENS = 4  # so that a rehearsal's short prompts come in parts


@dataclass(frozen=True)
class PrefillParts(Transform):
    """Read prompts in parts, those of several callers in turn, and give freed activations back to the system.

    A part attends to those before it as the cache holds them. This saves memory, not time.

    Args:
        tokens: most tokens of a part, of all sequences of a batch together.
    """

    tokens: int = 64

    name: ClassVar[str] = "prefill_parts"
    stage: ClassVar[Stage] = Stage.LOOP
    summary: ClassVar[str] = "prompts read in parts and in turn: a long one needs activations for one part only"

    def __post_init__(self) -> None:
        if self.phase != "prefill":
            raise ChoiceError("prefill_parts: phase must be 'prefill'; decode computes a token at a time")
        if self.tokens < 1:
            raise ChoiceError(f"prefill_parts: tokens must be 1 or more, not {self.tokens}")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        return self._obstacle(variant)

    def rehearsed(self) -> Transform:
        return PrefillParts("prefill", tokens=REHEARSED_TOKENS)

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        return {"prefill": 1.0}

    def apply(self, variant: Variant) -> None:
        if reason := self._obstacle(variant):
            raise TransformError(reason)
        variant.part_tokens = self.tokens
        variant.loop = variant.loop or decode

    def took_effect(self, variant: Variant) -> str | None:
        return None if variant.part_tokens == self.tokens and variant.loop is not None else "prompts are read whole"

    def _obstacle(self, variant: Variant) -> str | None:
        if variant.device.kind != "cpu":
            return f"it is for CPUs; this model runs on {variant.device.kind}"
        if variant.part_tokens is not None:
            return f"prompts are read in parts of {variant.part_tokens} tokens already"
        return variant.state.unseen("a part of a prompt") or seam.cannot_step(variant.original)
