"""A KV cache in the host's memory, for contexts that do not fit into a GPU's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import ChoiceError, TransformError
from ..runtime.loop import decode
from ..runtime.variant import Stage, Transform
from .growing_cache import not_growing, other_than
from .lean_loop import LeanLoop

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

LINK_BYTES_PER_S = 64e9  # PCIe 5.0 x16 in one direction, the fastest common link between GPU and host


@dataclass(frozen=True)
class OffloadedCache(Transform):
    """Keep keys and values in the host's memory. Each layer's are fetched while the layer before it computes."""

    name: ClassVar[str] = "offloaded_cache"
    stage: ClassVar[Stage] = Stage.CACHE
    summary: ClassVar[str] = "KV cache in the host's memory, fetched layer by layer, for contexts a GPU cannot hold"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.phase == "prefill":
            raise ChoiceError("offloaded_cache: phase must be 'decode' or 'both'; prefill has no cache to read")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device != "cuda":
            return f"there is nothing to offload to: the model runs on {hardware.device}, in the host's own memory"
        return not_growing(variant)

    def rehearsed(self) -> Transform:
        return LeanLoop("decode")

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """No speed-up: it saves memory only. At best, fetching overlaps computing; every token moves the whole cache
        over the link."""
        phase = profile.phases["decode"]
        return {"decode": phase.seconds / max(phase.seconds, phase.cache_bytes / LINK_BYTES_PER_S)}

    def apply(self, variant: Variant) -> None:
        if reason := not_growing(variant):
            raise TransformError(reason)
        from ..runtime.cache.narrow import KvCache

        variant.kv = KvCache("offloaded")
        variant.loop = decode

    def took_effect(self, variant: Variant) -> str | None:
        return other_than("offloaded", variant)
