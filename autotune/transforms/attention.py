"""Which of transformers' attention implementations computes a phase."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .. import roofline
from ..errors import TransformError
from . import Stage, Transform, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..hardware import Hardware
    from ..profile import Profile
    from ..variant import Variant
    from ..workload import Phase

# implementation -> the flag by which a model class declares that it supports it
SUPPORT = {
    "eager": None,
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}
PACKAGE = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@dataclass(frozen=True)
class Attention(Transform):
    """Another attention implementation, for the twin alone.

    Args:
        implementation: "sdpa", "eager", "flash_attention_2" or "flash_attention_3".
    """

    implementation: str = "sdpa"

    name: ClassVar[str] = "attention"
    stage: ClassVar[Stage] = Stage.ATTENTION
    summary: ClassVar[str] = "another of transformers' attention implementations"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.implementation, SUPPORT, "attention: implementation")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        model, wanted = variant.original, self.implementation
        if all(in_use(variant.modules[phase]) == {wanted} for phase in self.phases):
            return f"{wanted} is in use for {' and '.join(self.phases)} already"
        if not model._can_set_attn_implementation():
            return f"{type(model).__name__} has no exchangeable attention"
        flag = SUPPORT[wanted]
        if flag is not None and not getattr(model, flag, False):
            return f"{type(model).__name__} does not support {wanted}"
        if wanted in PACKAGE:
            if hardware.device != "cuda":
                return f"{wanted} needs a CUDA device"
            # asked here because transformers would look for a substitute on the hub
            if importlib.util.find_spec(PACKAGE[wanted]) is None:
                return f"package {PACKAGE[wanted]} is not installed"
        return None

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        return {phase: roofline.faster_attention(profile.phases[phase], hardware) for phase in self.phases}

    def apply(self, variant: Variant) -> None:
        for twin in variant.edit(self.phase):
            try:
                twin.set_attn_implementation(self.implementation)
            except (ValueError, ImportError) as error:
                raise TransformError(f"{self}: {error}") from error

    def took_effect(self, variant: Variant) -> str | None:
        for phase in self.phases:
            if (used := in_use(variant.modules[phase])) != {self.implementation}:
                return f"{phase} uses {' and '.join(sorted(map(str, used)))} instead of {self.implementation}"
        return None


def in_use(model: PreTrainedModel) -> set[Any]:
    """Attention implementations that the modules of a model will look up."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {c._attn_implementation for c in configs if hasattr(c, "_attn_implementation")}
