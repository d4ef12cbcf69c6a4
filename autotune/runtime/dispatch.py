"""How a variant serves a call: which calls it can serve, and which loop or module computes them, on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import MeasurementError
from ..model import route, seam, sharding
from . import attention_slots
from .ranks.leading import LEADER, Leading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .variant import Variant

# arguments of a direct forward that the prefill module computes with as the original does
SERVED = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict", "labels"}


def unsupported(variant: Variant, call: seam.Sampling) -> str | None:
    """Why a variant cannot serve a call of generate's loop, or None."""
    if not variant.transforms:
        return None
    if reason := call.unusual():
        return reason
    if call.input_ids.device != variant.original.device:  # transformers moves them, at each step
        return "inputs on another device than the model's"
    if attention_slots.is_used(variant.modules["decode"]) and not call.pads_left():
        return "padding that is not on the left"
    if variant.loop is not None and call.starts_over():
        return "a length at which the model reads everything before it anew"
    return None if variant.caches is None else variant.caches.unsupported(call)


def sample(variant: Variant, call: seam.Sampling) -> Any:
    """Serve one call of generate's loop, on all ranks; `unsupported` must have said None."""
    if (leader := _leader(variant)) is not None:
        return leader.sample(variant, call)
    if not variant.transforms:
        return call.original()
    with variant.device.guard():
        return call.run_on(variant.front) if variant.loop is None else variant.loop(variant, call)


def serves_forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the prefill module may serve a direct forward call: inference on ids, without unusual arguments."""
    asked = {k for k, v in kwargs.items() if v is not None}
    return len(args) <= 1 and asked <= SERVED and not torch.is_grad_enabled()


def forward(variant: Variant, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Serve one direct forward call without a cache from the caller, on all ranks."""
    if (leader := _leader(variant)) is not None:
        return leader.forward(variant, model, args, kwargs)
    if not serves_forward(args, kwargs):
        return seam.bare_class(model).forward(model, *args, **kwargs)
    with variant.device.guard(), variant.running("prefill") as module:
        return module(*args, **kwargs)


def _leader(variant: Variant) -> Leading | None:
    """Has all ranks run a variant's calls, if this rank tunes a sharded model."""
    return LEADER.get() if sharding.ranks(variant.original) > 1 else None


class Measured(route.Plain):
    """A router that runs a variant, with each call as one step between live requests."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.variant.turn():
            return forward(self.variant, model, args, kwargs)

    def sample(self, call: seam.Sampling) -> Any:
        if reason := unsupported(self.variant, call):
            return self.bypass(call, reason)
        with self.variant.turn():
            return sample(self.variant, call)

    def bypass(self, call: seam.Sampling, reason: str) -> Any:
        """Answer a call that the variant cannot serve; a subclass may have the original do so.

        Raises:
            MeasurementError: always.
        """
        raise MeasurementError(f"this variant cannot serve the measured call: {reason}")


def serving(variant: Variant) -> PreTrainedModel:
    """A model object whose `generate` and `forward` run `variant`, so that it is measured and judged as it serves."""
    return route.routed(variant.original, Measured(variant))
