"""Variants that answer calls of `generate` by a made-up loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from autotune.model.seam import Sampling
from autotune.runtime.variant import Variant
from benchmarks.prove.corruptions import Edit


def looping(model: PreTrainedModel, loop: Callable[[Variant, Sampling], Any]) -> Variant:
    """Return a variant whose own loop is given."""
    variant = Variant(model)
    variant.transforms = (Edit(),)
    variant.loop = loop
    return variant
