"""Prefill compiled for prompts of any length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..model import placement, seam
from ..runtime.variant import Stage, Transform
from .compile_step import no_compiler

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

LENGTHS = (24, 40, 56)  # tokens of the trial prompts; not powers of two, for which a compiler could specialise kernels


@dataclass(frozen=True)
class CompilePrefill(Transform):
    """Compile prefill's forward with dynamic shapes: operators between matmuls are fused, and launches are fewer.

    Batches of one row and of several rows are compiled separately, each when first seen. If calls keep asking for new
    code, prefill runs uncompiled.
    """

    name: ClassVar[str] = "compile_prefill"
    stage: ClassVar[Stage] = Stage.COMPILE
    foreign: ClassVar[bool] = True
    summary: ClassVar[str] = "torch.compile of prefill with dynamic shapes, for prompts of any length"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.phase != "prefill":
            raise ChoiceError("compile_prefill: phase must be 'prefill'")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if "forward" in vars(variant.modules["prefill"]):
            return "prefill is compiled already, or its forward was replaced"
        if reason := variant.state.unseen("compiled prefill") or placement.unrecordable(variant.original):
            return reason
        return no_compiler(hardware) or seam.cannot_step(variant.original)

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: only the time of matmuls and attention remains."""
        return {"prefill": ceilings.less_overhead(profile.phases["prefill"], hardware)}

    def apply(self, variant: Variant) -> None:
        from ..runtime.steps.compiled_prefill import Recompiling

        if reason := variant.state.unseen("compiled prefill"):
            raise TransformError(reason)
        (module,) = variant.edit("prefill")
        compiled = Recompiling(module)
        compiled.try_out(LENGTHS, variant.original.device)
        module.forward = compiled

    def took_effect(self, variant: Variant) -> str | None:
        from ..runtime.steps.compiled_prefill import Recompiling

        forward = vars(variant.modules["prefill"]).get("forward")
        if not isinstance(forward, Recompiling) or not forward.compilations:
            return "prefill was not compiled"
        return None if forward.given_up is None else f"prefill runs uncompiled: {forward.given_up}"
