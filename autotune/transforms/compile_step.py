"""The decode step as one compiled graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .. import roofline
from ..errors import ChoiceError
from . import Stage, Transform, require
from .static_cache import no_slots, use_slots

if TYPE_CHECKING:
    from ..hardware import Hardware
    from ..profile import Profile
    from ..variant import Variant
    from ..workload import Phase


@dataclass(frozen=True)
class CompileStep(Transform):
    """Compiles a decode step over static slots ahead of time, for the workload's batch sizes; others run uncompiled.

    Args:
        layers: "once" generates code for one decoder layer and calls it for each; "unrolled" generates every layer,
            which takes several times as long and lets the compiler fuse across layers.
        slots: tokens a sequence has room for; 0 as in `static_cache`.
    """

    layers: str = "once"
    slots: int = 0

    name: ClassVar[str] = "compile_step"
    stage: ClassVar[Stage] = Stage.COMPILE
    summary: ClassVar[str] = "torch.compile of the whole decode step over a static KV cache, ahead of time"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.layers, ("once", "unrolled"), "compile_step: layers")
        if self.phase != "decode":
            raise ChoiceError("compile_step: phase must be 'decode'")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if variant.step is not None:
            return "the decode step is compiled already"
        if hardware.device == "cpu" and hardware.compiler is None:
            return "torch.compile needs a C++ compiler on a CPU, and none was found; install g++ or set $CXX"
        return no_slots(variant.original)

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """At best nothing is left but what has to move and be computed."""
        return {"decode": roofline.less_overhead(profile.phases["decode"], hardware)}

    def apply(self, variant: Variant) -> None:
        from ..cache import SlotCache, example
        from ..compiled import CompiledStep

        use_slots(variant, self.slots)
        assert variant.caches is not None  # noqa: S101 - use_slots made it; for the type checker
        step = CompiledStep(variant.modules["decode"], regions=self.layers == "once")
        for batch in variant.batch_sizes:
            with variant.running("decode"):
                step.prepare(SlotCache(example(variant.original, batch), variant.caches.slots))
        variant.step = step

    def took_effect(self, variant: Variant) -> str | None:
        if variant.step is None or variant.caches is None:
            return "there is no compiled step"
        wanted = {(batch, variant.caches.slots) for batch in variant.batch_sizes}
        missing = sorted(wanted - set(variant.step.shapes))
        return f"no step for (batch, slots) {missing}" if missing else None
