"""A KV cache of narrow numbers, for contexts that do not fit into memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..errors import ChoiceError, TransformError
from ..model.configured import text_config
from ..runtime.loop import decode
from ..runtime.variant import Stage, Transform
from . import require
from .growing_cache import not_growing, other_than

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

LIBRARIES = {"quanto": "optimum.quanto", "hqq": "hqq"}  # backend -> module; PyPI: optimum-quanto, hqq
PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}


@dataclass(frozen=True)
class QuantisedCache(Transform):
    """Store keys and values in 8 or 4 bits; see `autotune.runtime.cache.narrow`.

    Args:
        scheme: "int8", "fp8" (8 bits, relative precision) or "int4" (groups of 32).
        backend: "own", or for "int4" a library that transformers' QuantizedCache takes: "quanto" or "hqq".
    """

    scheme: str = "int8"
    backend: str = "own"

    name: ClassVar[str] = "quantised_cache"
    stage: ClassVar[Stage] = Stage.CACHE
    summary: ClassVar[str] = "KV cache in INT8, FP8 or INT4, which takes half the memory or less"
    sharded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.scheme, ("int8", "int4", "fp8"), "quantised_cache: scheme")
        require(self.backend, ("own", *LIBRARIES), "quantised_cache: backend")
        if self.backend != "own" and self.scheme != "int4":
            raise ChoiceError(f"quantised_cache: backend {self.backend!r} is for scheme 'int4', not {self.scheme!r}")
        if self.phase == "prefill":
            raise ChoiceError("quantised_cache: phase must be 'decode' or 'both'; prefill has no cache to read")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if reason := not_growing(variant):
            return reason
        if self.backend == "own":
            return self._indivisible(variant)
        if _missing(LIBRARIES[self.backend]):
            return f"{self.backend} is not installed: pip install {PACKAGES[self.backend]}"
        kinds = set(getattr(_config(variant), "layer_types", None) or ()) - {"full_attention"}
        return f"{self.backend} caches take no layers of type {', '.join(sorted(kinds))}" if kinds else None

    def rehearsed(self) -> Transform:
        return self

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """No speed-up: it saves memory only. Keys and values are decoded to full size before attention reads them."""
        return {"decode": 1.0}

    def apply(self, variant: Variant) -> None:
        if reason := not_growing(variant) or self._indivisible(variant):
            raise TransformError(reason)
        from ..runtime.cache.narrow import KvCache

        kind: Literal["int8", "int4", "fp8", "quanto", "hqq"]
        kind = self.scheme if self.backend == "own" else self.backend  # type: ignore[assignment]  # __post_init__ checked
        variant.kv = KvCache(kind)
        variant.loop = decode

    def took_effect(self, variant: Variant) -> str | None:
        kind = self.scheme if self.backend == "own" else self.backend
        return other_than(kind, variant)

    def _indivisible(self, variant: Variant) -> str | None:
        from ..diagnose.work import attention_layers

        if self.scheme != "int4" or self.backend != "own":
            return None
        odd = sorted({keys.head_size for keys in attention_layers(variant.original) if keys.head_size % 32})
        return f"INT4 stores groups of 32 numbers, and heads have {odd[0]}" if odd else None


def _config(variant: Variant) -> object:
    return text_config(variant.original)


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ImportError:  # a parent package is missing
        return True
