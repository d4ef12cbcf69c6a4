"""A decode step as a graph of ATen operators, recorded without computing anything."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ....errors import TransformError, first_line
from ....machine import outside
from ...cache.slots import SlotCache, run

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from .given import ModuleCalls


def trace(module: Any, cache: SlotCache, given: ModuleCalls | None = None) -> GraphModule:
    """Record `cache.run` for this module and this cache's shape.

    Args:
        given: what the step reads besides them, or None.

    Returns:
        A graph over (token, position, slot, valid, *keys, *values, *given) that returns logits [B, V]. It holds weights
        as attributes, by reference. Every node's `meta["val"]` is a fake tensor with the value's shape and strides.

    Raises:
        TransformError: the step cannot be recorded, because its operators depend on values.
    """

    def step(*inputs: Any) -> torch.Tensor:
        *known, extra = inputs
        with given.returning(extra) if given is not None else nullcontext():
            return run(module, *known)

    token = torch.zeros(cache.valid.shape[0], 1, dtype=torch.int64, device="cpu")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor
    try:
        with torch.no_grad(), mode:
            return make_fx(step, tracing_mode="real")(
                *(fake(t) for t in (token, token.clone(), cache.slot, cache.valid)),
                [fake(keys) for keys in cache.keys],
                [fake(values) for values in cache.values],
                [fake(each) for each in given.tensors] if given is not None else [],
            )
    except Exception as error:  # a model's own code and torch's tracer may raise anything
        outside.pass_on(error)
        raise TransformError(f"the decode step cannot be recorded: {first_line(error)}") from error
