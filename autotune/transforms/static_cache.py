"""A KV cache whose slots are allocated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..diagnose import ceilings
from ..diagnose.parts import CACHE
from ..errors import ChoiceError, TransformError
from ..model import placement, seam
from ..model.configured import context, text_config
from ..runtime.loop import decode
from ..runtime.variant import Stage, Transform

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

ROUND_TO = 128  # slots are a multiple of this; it is a multiple of every vector width and of flash attention's blocks
MEMORY_SHARE = 0.5  # share of the machine's memory that full slots may take
REHEARSED_SLOTS = 64  # slots in a rehearsal; enough for its longest request
HEADROOM = 2  # slots per token of the workload's longest context


@dataclass(frozen=True)
class StaticCache(Transform):
    """Decode over a KV cache allocated once and reused, in the lean loop: no growth, no copies, constant shapes.

    Args:
        slots: tokens a sequence has room for; 0 means twice the workload's longest context, but at most the model's.
    """

    slots: int = 0

    name: ClassVar[str] = "static_cache"
    stage: ClassVar[Stage] = Stage.CACHE
    summary: ClassVar[str] = "KV cache in slots allocated once, decoded in the lean loop"
    sharded: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.slots < 0:
            raise ChoiceError(f"static_cache: slots must be 0 (automatic) or more, not {self.slots}")
        if self.phase == "prefill":
            raise ChoiceError("static_cache: phase must be 'decode' or 'both'; prefill has no cache to read")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if variant.caches is not None:
            return f"the cache is static already ({variant.caches.slots} slots)"
        if variant.kv is not None:
            return f"the KV cache is {variant.kv}"
        return slotless(variant)

    def rehearsed(self) -> Transform:
        return over_few_slots()

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: the cache's growth and the loop's work between steps take no time."""
        return {"decode": ceilings.shorter_loop(profile.phases["decode"], hardware, also=(CACHE,))}

    def extra_bytes(self, variant: Variant) -> float:
        return slot_bytes(variant, self.slots)

    def apply(self, variant: Variant) -> None:
        use_slots(variant, self.slots)

    def took_effect(self, variant: Variant) -> str | None:
        return None if variant.caches is not None and variant.loop is not None else "decode does not run over slots"


def over_few_slots() -> Transform:
    """The transform that shows, on a tiny model, whether an architecture can be decoded over slots."""
    return StaticCache("decode", slots=REHEARSED_SLOTS)


def no_slots(model: PreTrainedModel) -> str | None:
    """Why a model cannot decode over slots, or None."""
    from ..runtime.cache.slot_forward import unsupported

    return placement.one_device(model) or seam.cannot_step(model) or unsupported(text_config(model))


def slotless(variant: Variant, phase: Phase = "decode") -> str | None:
    """Why a phase of a variant cannot go over slots, or None: its attention must mask those that are empty."""
    from .attention import without_mask

    if reason := no_slots(variant.original):
        return reason
    if (name := without_mask(variant.modules[phase], variant.original.device)) is None:
        return None
    return f"{phase}'s attention is {name}, which takes no mask, and slots need one for those that are empty"


def use_slots(variant: Variant, slots: int = 0) -> None:
    """Give the variant a static cache and the loop that drives it, unless it has them.

    Raises:
        TransformError: the model cannot decode over slots.
    """
    from ..runtime.cache.pool import CachePool

    if reason := slotless(variant):
        raise TransformError(reason)
    if variant.caches is None:
        variant.caches = CachePool(text_config(variant.original), slots or automatic_slots(variant))
    variant.loop = decode


def slot_bytes(variant: Variant, slots: int = 0, rows: int = 0, *, anew: bool = False) -> float:
    """Bytes of a static cache; 0 on a CPU, where empty slots take no memory.

    Args:
        slots: slots of each row; 0: automatic.
        rows: sequences in all; 0: the workload's largest batch.
        anew: whether the slots are made beside those that the variant may have; else these are used, and take nothing.
    """
    from ..diagnose.work import cache_size

    if (variant.caches is not None and not anew) or variant.device.kind == "cpu":
        return 0.0
    slots = slots or automatic_slots(variant)
    return cache_size(variant.original, rows or max(variant.batch_sizes), slots, variant.original.dtype.itemsize)


def roomy_slots(variant: Variant, dtype: torch.dtype | None = None) -> int:
    """Slots for the model's longest context, or as many as fit half of the machine's memory when all are filled.

    For decoders that read only filled slots: there, an empty slot costs only address space.

    Args:
        dtype: dtype of keys and values; None means the model's.
    """
    from ..diagnose.work import cache_size
    from ..machine.processor import memory_bytes

    least = automatic_slots(variant)
    itemsize = (dtype or variant.original.dtype).itemsize
    per_slot_bytes = cache_size(variant.original, max(variant.batch_sizes), 1, itemsize)
    most = int(memory_bytes() * MEMORY_SHARE / per_slot_bytes)
    return max(least, min(context(variant.original) or least, most))


def automatic_slots(variant: Variant) -> int:
    wanted = -(-HEADROOM * variant.context_tokens // ROUND_TO) * ROUND_TO
    return min(wanted, context(variant.original) or wanted)
