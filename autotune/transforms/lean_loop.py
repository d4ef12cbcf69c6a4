"""A decoding loop without transformers' work between the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..diagnose import ceilings
from ..errors import ChoiceError
from ..model import seam
from ..runtime.loop import decode
from ..runtime.variant import Stage, Transform

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase


@dataclass(frozen=True)
class LeanLoop(Transform):
    """Run greedy search and sampling with generate's tokens and less work between steps; see `runtime.loop`."""

    name: ClassVar[str] = "lean_loop"
    stage: ClassVar[Stage] = Stage.LOOP
    summary: ClassVar[str] = "generate's decoding loop without its per-token preparation"
    sharded: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.phase == "prefill":
            raise ChoiceError("lean_loop: phase must be 'decode' or 'both'; prefill has no loop")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if variant.loop is not None:
            return "the loop is lean already"
        return seam.cannot_step(variant.original)

    def rehearsed(self) -> Transform:
        return self

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: the time outside the model's forward disappears."""
        return {"decode": ceilings.shorter_loop(profile.phases["decode"], hardware)}

    def apply(self, variant: Variant) -> None:
        variant.loop = decode

    def took_effect(self, variant: Variant) -> str | None:
        return None if variant.loop is not None else "transformers' loop still runs"
