"""A plan of autotune's that nobody searched for: what its kernels come to where a model bears no narrower weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autotune import transforms
from autotune.diagnose.work import stored_weights
from autotune.runtime import kernels
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from benchmarks.peers import Setup, Weights
from benchmarks.peers.hugging_face import bytes_per_token, load
from benchmarks.peers.tuned import Tuned


class Fixed(Tuned):
    def __init__(self, variant: Variant) -> None:
        super().__init__(serving(variant))
        self.variant = variant

    def weights(self) -> Weights:
        modules = self.variant.modules
        return Weights(stored_weights(self.variant.original, *modules.values()), bytes_per_token(modules["decode"]))

    def notes(self) -> list[str]:
        return ["a fixed plan: " + " + ".join(map(str, self.variant.transforms))]


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for BF16, so that prefill may use them."""
    return (kernels.available() or kernels.no_bf16_unit()) is None


def multiplies_tiles() -> bool:
    """Whether it has tiles for BF16 (AMX), which are many times as fast as its vectors."""
    return multiplies_bf16() and torch.ops.autotune.bf16_unit() == 2


def create(setup: Setup, weights: str, params: Mapping[str, Any], prefill: str, rounds: bool) -> Fixed:
    """The plan with these weights.

    Args:
        prefill: arithmetic of prefill where the processor multiplies tiles of BF16. Others take BF16 products for
            rounded weights, and FP32 for those in FP16, over decode's weights.
        rounds: whether activations are rounded to 8 bits, as llama.cpp and OpenVINO round them.
    """
    narrow = weights == "weight_only" and multiplies_bf16()
    if not multiplies_tiles() and not rounds:
        prefill = "linear_bf16" if narrow else "packed_prefill"
    plan = [
        transforms.make(weights, dict(params), "decode"),
        transforms.make(prefill, {"weights": "decode"} if prefill == "linear_bf16" else {}, "prefill"),
        transforms.make("prefill_attention", {"precision": "bfloat16"} if narrow else {}, "prefill"),
        transforms.make("fused_layers", {}, "prefill"),
        transforms.make("half_cache", {}, "decode"),  # as llama.cpp keeps keys and values
        transforms.make("step_program", {}, "decode"),
    ]
    plan += [transforms.make("int8_activations", {}, phase) for phase in ("prefill", "decode") if rounds]
    with torch.no_grad():
        return Fixed(Variant(load(setup)).with_transforms(plan))
