"""The decode step as a program of C++ instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..model import placement
from ..model.configured import text_config
from ..runtime.loop import decode
from ..runtime.variant import Stage, Transform
from ..runtime.widening import NARROW
from . import one_query_attention
from .static_cache import REHEARSED_SLOTS, no_slots, roomy_slots

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase


@dataclass(frozen=True)
class StepProgram(Transform):
    """Record a decode step over static slots once and run it in C++ with one team of threads: no Python, no dispatch.

    The workload's batch sizes are recorded at once, others when they are first seen. The cache has room for the model's
    longest context, because only filled slots take memory and only filled slots are read.

    Programs compute in FP32. The packed layers of a 16-bit model already do; its norms and biases are widened, and keys
    and values are kept in FP32, or in FP16 after `half_cache`.

    Args:
        slots: tokens a sequence has room for; 0 means the model's longest context, or what memory allows.
    """

    slots: int = 0

    name: ClassVar[str] = "step_program"
    stage: ClassVar[Stage] = Stage.COMPILE
    summary: ClassVar[str] = "the whole decode step recorded and run as one C++ program over a static KV cache"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.slots < 0:
            raise ChoiceError(f"step_program: slots must be 0 (automatic) or more, not {self.slots}")
        if self.phase != "decode":
            raise ChoiceError("step_program: phase must be 'decode'")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if variant.step is not None:
            return "the decode step is recorded or compiled already"
        if variant.kv is not None:
            return f"the KV cache is {variant.kv}"
        if reason := placement.unrecordable(variant.original) or no_slots(variant.original):
            return reason
        if reason := next(filter(None, map(self.excludes, variant.transforms)), None):
            return reason
        uses_kernel = one_query_attention.is_used(variant)
        return None if uses_kernel else one_query_attention.OneQueryAttention("decode").unavailable(variant, hardware)

    def excludes(self, other: Transform) -> str | None:
        applies = "decode" in other.phases and not other.recordable
        return f"a program cannot read the weights of {other}" if applies else None

    def rehearsed(self) -> Transform:
        return StepProgram("decode", slots=REHEARSED_SLOTS)

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: only the time for moving data and for arithmetic, in FP32, remains.

        The program has kernels of its own: torch's may read plain weights at half of the memory's bandwidth.
        """
        phase = profile.phases["decode"]
        dtype = "float32" if getattr(torch, phase.compute_dtype, None) in NARROW else None
        return {"decode": ceilings.less_overhead(phase, hardware, new_kernels=True, compute_dtype=dtype)}

    def apply(self, variant: Variant) -> None:
        from ..runtime import kernels, widening
        from ..runtime.cache.pool import CachePool
        from ..runtime.cache.slots import SlotCache
        from ..runtime.steps.program import StepPrograms

        if reason := kernels.available():
            raise TransformError(reason)
        one_query_attention.use_kernel(variant)
        if reason := no_slots(variant.original):
            raise TransformError(reason)
        dtype = variant.slot_dtype
        if widening.is_narrow(variant.modules["decode"]):
            dtype = dtype or torch.float32
            for twin in variant.edit("decode"):
                widening.widen(twin)
        slots = self.slots or roomy_slots(variant, dtype)
        variant.caches = CachePool(text_config(variant.original), slots, dtype=dtype)
        variant.loop = decode
        programs = StepPrograms(variant.modules["decode"])
        for batch in variant.batch_sizes:
            example = variant.example(batch)
            programs.prepare(SlotCache(example, slots, dtype=dtype))
            variant.caches.know(example)
        variant.step = programs

    def took_effect(self, variant: Variant) -> str | None:
        if variant.step is None or variant.caches is None:
            return "there is no recorded step"
        wanted = {(batch, variant.caches.slots) for batch in variant.batch_sizes}
        missing = sorted(wanted - set(variant.step.shapes))
        return f"no step for (batch, slots) {missing}" if missing else None
