"""Measure how decoding grows: throughput over batch sizes, time per token over context lengths."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..diagnose.costs import ScalePoint
from ..diagnose.work import Forward, activation_dtype, activation_size, cache_size, copied_weights
from ..errors import MeasurementError
from ..machine import device as devices
from ..model import configured
from ..model.linear_layers import stored_bytes
from .budget import Budget
from .timing import time_request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..runtime.variant import Variant

logger = logging.getLogger("autotune")

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (64, 256, 1024, 4096)
STEPS = 6  # tokens generated per point; the five steps after the first token are averaged
PROMPT_TOKENS = 32  # tokens to which batch scaling cuts the prompt: only decoding is measured, and prefill is slow
FREE_SHARE = 0.5  # share of free memory that a scan may use, so that it never pushes the user's process into swap
HOST_SHARE = 0.25  # of the model's own bytes on a CPU: a scan is for the report, and must not decide the peak of tuning


def room(variant: Variant) -> float:
    """Bytes that a scan of a variant may use beside the weights."""
    model = variant.original
    free = FREE_SHARE * devices.of(model).memory().free
    return min(free, HOST_SHARE * stored_bytes(model)) if model.device.type == "cpu" else free


def batch_scaling(
    served: PreTrainedModel, prompt: torch.Tensor, batches: Sequence[int], room_bytes: float, clock: Budget
) -> tuple[ScalePoint, ...]:
    """Time decode steps at each batch size that fits memory and the budget; of memory, the first always does.

    Args:
        served: the model as it will serve.
        prompt: one prompt, [1, P] int64.
        batches: sizes in ascending order.
        room_bytes: memory that may be used.
        clock: the budget that decides whether the next point still fits.
    """
    points = list[ScalePoint]()
    prompt = prompt[:, :PROMPT_TOKENS]
    for batch in batches:
        needed = _needed(served, batch, prompt.shape[1] + STEPS) + copied_weights(served, batch)
        if (points and needed > room_bytes) or not clock.allows(growth=2):
            break
        point = _point(served, prompt.expand(batch, -1).contiguous(), clock, f"batch {batch}")
        if point is None:
            break
        points.append(point)
    return tuple(points)


def context_growth(
    served: PreTrainedModel, prompt: torch.Tensor, room_bytes: float, clock: Budget
) -> tuple[ScalePoint, ...]:
    """Time decode steps at growing context lengths within the model's limit, memory and the budget.

    The prompt is repeated. The other arguments are those of `batch_scaling`.
    """
    limit = configured.context(served) or CONTEXTS[-1]
    points = list[ScalePoint]()
    for context in (c for c in CONTEXTS if c + STEPS <= limit):
        if points and _needed(served, 1, context + STEPS) > room_bytes:
            break
        if not clock.allows(growth=16):  # the prompt is 4 times longer, and attention grows with its square
            break
        ids = prompt.repeat(1, -(-context // prompt.shape[1]))[:, :context]
        point = _point(served, ids, clock, f"context {context}")
        if point is None:
            break
        points.append(point)
    return tuple(points)


def _needed(served: PreTrainedModel, batch: int, tokens: int) -> int:
    size = activation_dtype(served).itemsize
    return cache_size(served, batch, tokens, size) + activation_size(served, Forward(batch, tokens), size)


def growth_s(points: Sequence[ScalePoint], context: int) -> float:
    """Return the seconds that the context adds to a token at `context`, from the slope of the first and last point."""
    if len(points) < 2:
        return 0.0
    first, last = points[0], points[-1]
    slope = (last.seconds_per_step - first.seconds_per_step) / (last.context - first.context)
    return max(0.0, slope * context)


def _point(served: PreTrainedModel, ids: torch.Tensor, clock: Budget, name: str) -> ScalePoint | None:
    """Measure one point; None if the variant does not serve such a request (a cache too short)."""
    with clock.step(name):
        try:
            request = time_request(served, ids, STEPS)
        except MeasurementError as error:
            logger.info("%s is not measured: %s", name, error)
            return None
    return ScalePoint(ids.shape[0], ids.shape[1], request.tpot_s)
