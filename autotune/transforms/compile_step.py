"""The decode step as one compiled graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..diagnose import ceilings
from ..errors import Blocker, ChoiceError, TransformError
from ..machine import device as devices
from ..model import linear_layers, placement
from ..model.configured import text_config
from ..runtime.loop import decode
from ..runtime.variant import Stage, Transform
from . import require
from .static_cache import automatic_slots, over_few_slots, slot_bytes, slotless, use_slots

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

TRITON_CAPABILITY = (7, 0)  # lowest compute capability that Triton supports (Volta); see torch.utils._triton


@dataclass(frozen=True)
class CompileStep(Transform):
    """Compile a decode step over static slots ahead of time for the workload's batch sizes. Others run uncompiled.

    Args:
        mode: "default"; "max-autotune" tries Triton kernels for every matmul, on a GPU; "reduce-overhead" adds
            inductor's CUDA graphs.
        layers: "once" generates code for one decoder layer and calls it for each; "unrolled" generates every layer,
            which takes several times as long and lets the compiler fuse across layers.
        slots: tokens a sequence has room for; 0 means the same as in `static_cache`.
    """

    mode: str = "default"
    layers: str = "once"
    slots: int = 0

    name: ClassVar[str] = "compile_step"
    stage: ClassVar[Stage] = Stage.COMPILE
    foreign: ClassVar[bool] = True
    summary: ClassVar[str] = "torch.compile of the whole decode step over a static KV cache, ahead of time"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.mode, ("default", "max-autotune", "reduce-overhead"), "compile_step: mode")
        require(self.layers, ("once", "unrolled"), "compile_step: layers")
        if self.phase != "decode":
            raise ChoiceError("compile_step: phase must be 'decode'")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if variant.step is not None and not self._captured_anew(variant):
            return "the decode step is compiled or recorded already"
        if variant.kv is not None:
            return f"the decode step is compiled over slots, and the KV cache is {variant.kv}"
        if reason := variant.state.unseen("a compiled step") or placement.unrecordable(variant.original):
            return reason
        return no_compiler(hardware) or self._out_of_place(variant) or slotless(variant)

    def _captured_anew(self, variant: Variant) -> bool:
        """Whether the step runs as CUDA graphs, which will be captured again around the compiled step."""
        from ..runtime.steps.graphs import GraphSteps

        plain = isinstance(variant.step, GraphSteps) and variant.step.inner is None
        return plain and self.mode != "reduce-overhead"

    def _out_of_place(self, variant: Variant) -> str | None:
        device = devices.of(variant.original)
        if self.mode == "max-autotune" and device.kind == "cpu":
            return "max-autotune chooses among Triton kernels, which a CPU does not run"
        if self.mode != "reduce-overhead":
            return None
        return device.without_graphs() or linear_layers.waiting(variant.modules["decode"])

    def rehearsed(self) -> Transform:
        return over_few_slots()

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: only the time for moving data and for arithmetic remains."""
        return {"decode": ceilings.compiled(profile.phases["decode"], hardware)}

    def extra_bytes(self, variant: Variant) -> float:
        return slot_bytes(variant, self.slots)

    def apply(self, variant: Variant) -> None:
        from ..runtime.cache.slots import SlotCache
        from ..runtime.steps.compiled import CompiledStep

        if reason := self._out_of_place(variant) or variant.state.unseen("a compiled step"):
            raise TransformError(reason)
        if self.mode == "reduce-overhead":
            self._apply_graphs(variant)
            return
        use_slots(variant, self.slots)
        assert variant.caches is not None  # noqa: S101 - use_slots made it; for the type checker
        step = CompiledStep(variant.modules["decode"], self.layers == "once", self.mode)
        for batch in variant.batch_sizes:
            with variant.running("decode"):
                step.prepare(SlotCache(variant.example(batch), variant.caches.slots, dtype=variant.slot_dtype))
        variant.step = step

    def _apply_graphs(self, variant: Variant) -> None:
        from ..runtime.cache.pool import CachePool
        from ..runtime.steps.inductor_graphs import InductorGraphStep

        config = text_config(variant.original)
        slots = variant.caches.slots if variant.caches else self.slots or automatic_slots(variant)
        variant.caches = CachePool(config, slots, dtype=variant.slot_dtype)
        variant.loop = decode
        step = InductorGraphStep(variant.modules["decode"], devices.of(variant.original), self.layers == "once")
        for batch in variant.batch_sizes:
            with variant.running("decode"), variant.caches.keep(variant.example(batch), 1) as (cache,):
                step.prepare(cache)
        variant.step = step

    def took_effect(self, variant: Variant) -> str | None:
        from ..runtime.steps.graphs import GraphSteps

        step = variant.step.inner if isinstance(variant.step, GraphSteps) else variant.step  # captured later
        if step is None or variant.caches is None:
            return "there is no compiled step"
        wanted = {(batch, variant.caches.slots) for batch in variant.batch_sizes}
        missing = sorted(wanted - set(step.shapes))
        return f"no step for (batch, slots) {missing}" if missing else None


def no_compiler(hardware: Hardware) -> str | None:
    """Why torch.compile cannot generate code on this machine, or None."""
    if hardware.device == "cpu":
        missing = Blocker("torch.compile needs a C++ compiler on a CPU; install g++ or set $CXX")
        return missing if hardware.compiler is None else None
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU, and it is not installed"
    if tuple(map(int, hardware.capability.split("."))) < TRITON_CAPABILITY:
        return f"Triton needs compute capability 7.0, and this GPU has {hardware.capability}"
    return None
