"""A decoder layer of prefill as two operators, with the cache and attention between them.

A short prompt spends a fifth of its time between operators. The layer's own modules stay where they are: they hold the
weights, and they compute whenever the operators cannot, for example while hooks watch them. A layer is recognised by
what it computes: its modules, put together as the operators do it, must give the same numbers.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model import seam
from .kernels.bf16 import FEW, Bf16Linear
from .kernels.fused import GatedMlp, RmsNorm
from .kernels.modules import GroupedLinear, HalfLinear
from .merged_blocks import ATTENTION, CONSTANT, NORMED, BlockCall, is_close, random_like, recorded

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
FUSED = "autotune_fused_layer"  # an attribute of the forwards that are made here


class Precision(NamedTuple):
    """How all of a layer's products are computed.

    Args:
        heads, end: the operators before and after attention.
        number: digits of the inputs in integers, or their parts in BF16; 0 for FP32.
    """

    heads: Callable[..., tuple[Tensor, Tensor, Tensor]]
    end: Callable[..., Tensor]
    number: int


class _Layer:
    """The modules of a decoder layer."""

    def __init__(self, layer: Any) -> None:
        held = layer._modules  # an attribute of a module takes ten times as long
        self.before, self.after = held["input_layernorm"], held["post_attention_layernorm"]
        self.attention, self.mlp = held["self_attn"], held["mlp"]
        inner, gated = self.attention._modules, self.mlp._modules
        self.q, self.k, self.v, self.o = (inner[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        self.q_norm, self.k_norm = inner.get("q_norm"), inner.get("k_norm")
        self.gate, self.up, self.down = (gated[name] for name in ("gate_proj", "up_proj", "down_proj"))

    def are_as_exchanged(self) -> bool:
        """Whether calling the modules one by one would do no more than the operators do."""
        held = (self.before, self.after, self.attention, self.mlp, self.q_norm, self.k_norm)
        linear = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        if any(m is not None and (m._forward_hooks or m._forward_pre_hooks) for m in (*held, *linear)):
            return False
        kinds = (self.before, self.after, *(m for m in (self.q_norm, self.k_norm) if m is not None))
        return (
            all(type(norm) is RmsNorm for norm in kinds)
            and type(self.mlp) is GatedMlp
            and not self.attention.training
            and hasattr(self.attention.__dict__.get("forward"), seam.ROTARY)
            and not any("forward" in m.__dict__ for m in (self.mlp, *kinds, *linear))
        )

    def precision(self, tokens: int) -> Precision | None:
        """How the operators multiply so many tokens by this layer's weights; None if they cannot."""
        given = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        linear = [m.serving(tokens) if isinstance(m, Bf16Linear) else m for m in given]
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = linear
        first, ops = linear[0], torch.ops.autotune
        if isinstance(first, Bf16Linear):
            if all(isinstance(m, Bf16Linear) and m.parts == first.parts and tokens >= FEW for m in linear):
                return Precision(ops.layer_heads.default, ops.layer_end.default, first.parts)
        elif isinstance(first, GroupedLinear) and first.in_integers:
            alike = all(isinstance(m, GroupedLinear) and m.digits == first.digits for m in linear)
            if alike and first.rounds_like(self.k) and first.rounds_like(self.v) and self.gate.rounds_like(self.up):
                return Precision(ops.layer_heads_rounded.default, ops.layer_end_rounded.default, first.digits)
        elif all(isinstance(m, HalfLinear) for m in linear):
            return Precision(ops.layer_heads_floats.default, ops.layer_end_floats.default, 0)
        return None


def fused_forward(layer: nn.Module) -> types.FunctionType | None:
    """A forward for a decoder layer whose parts have been exchanged, or None if it is of no known form."""
    if {name for name, _ in layer.named_children()} != LAYER or "forward" in vars(layer):
        return None
    attention: Any = layer.self_attn
    rotated = attention.__dict__.get("forward")
    children = {name for name, _ in attention.named_children()}
    if children not in (ATTENTION, ATTENTION | NORMED) or not hasattr(rotated, seam.ROTARY):
        return None
    if type(layer.mlp) is not GatedMlp:
        return None
    parts = _Layer(layer)
    if not parts.are_as_exchanged() or parts.k.out_features != parts.v.out_features:
        return None
    cache_name = seam.cache_argument(seam.forward_function(attention))
    if cache_name is None or not all(hasattr(attention, name) for name in ("config", "layer_idx", "head_dim")):
        return None
    eager = rotated.__func__.__globals__.get(seam.EAGER)
    x = random_like(parts.before.weight, 1, 3, len(parts.before.weight))
    try:
        block = recorded(attention, x, cache_name)
        constants = block.constants
        if eager is None or any(type(value) not in CONSTANT for value in constants.values()):
            return None
        expected = _recorded(layer, type(layer).forward, x, cache_name)
        got = _recorded(layer, _composed(eager, constants), x, cache_name)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # it does not take the inputs of a decoder layer
    alike = expected.cached == got.cached == [attention.layer_idx] and len(expected.tensors) == len(got.tensors)
    if not alike or not all(map(is_close, expected.tensors, got.tensors)):
        return None
    return _forward(type(layer).forward, eager, constants)


def _forward(own: Callable[..., Any], eager: seam.Attend, constants: Mapping[str, Any]) -> types.FunctionType:
    """The layer's forward by the operators, and its class's `own` one where they cannot be used."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        parts, angles = _Layer(self), kwargs.get("position_embeddings")
        if args or angles is None or not _fits(parts, hidden_states, angles) or not parts.are_as_exchanged():
            return own(self, hidden_states, *args, **kwargs)
        precision = parts.precision(hidden_states.shape[0] * hidden_states.shape[1])
        if precision is None:
            return own(self, hidden_states, **kwargs)
        attention, given = parts.attention, dict(kwargs)
        del given["position_embeddings"]
        mask, cache = given.pop("attention_mask", None), seam.pop_cache(given)
        if cache is not None and not seam.appends(cache, attention.layer_idx):
            return own(self, hidden_states, **kwargs)
        q_norm, k_norm = parts.q_norm, parts.k_norm
        q, k, v = precision.heads(
            hidden_states,
            parts.before.weight,
            parts.before.eps,
            *(m.stored for m in (parts.q, parts.k, parts.v)),
            *(m.bias for m in (parts.q, parts.k, parts.v)),
            *(None if m is None else m.weight for m in (q_norm, k_norm)),
            0.0 if q_norm is None else q_norm.eps,
            parts.q.out_features,
            parts.k.out_features,
            angles[0],
            angles[1],
            precision.number,
        )
        if cache is not None:
            k, v = cache.update(k, v, attention.layer_idx)
        attend = seam.attention_function(seam.attention_of(attention.config), eager)
        attended, _ = attend(attention, q, k, v, mask, **{**constants, **given})
        return precision.end(
            hidden_states,
            attended,
            parts.o.stored,
            parts.o.bias,
            parts.after.weight,
            parts.after.eps,
            *(m.stored for m in (parts.gate, parts.up, parts.down)),
            *(m.bias for m in (parts.gate, parts.up, parts.down)),
            parts.gate.out_features,
            parts.mlp.activation,
            precision.number,
        )

    setattr(forward, FUSED, True)
    return forward  # type: ignore[return-value]


def _fits(parts: _Layer, x: Tensor, angles: Any) -> bool:
    """Whether the operators take these inputs."""
    if type(angles) is not tuple or len(angles) != 2 or x.dim() != 3 or not x.numel():
        return False
    given = (x, *angles)
    if any(t.dtype != torch.float32 or t.device.type != "cpu" or t.requires_grad for t in given):
        return False
    shape = angles[0].shape
    return (
        angles[1].shape == shape
        and len(shape) == 3
        and shape[0] in (1, x.shape[0])
        and shape[1:] == (x.shape[1], parts.attention.head_dim)
        and (parts.q_norm is None or parts.q_norm.eps == parts.k_norm.eps)
    )


def _composed(eager: seam.Attend, constants: Mapping[str, Any]) -> Callable[..., Any]:
    """The layer's forward as the operators compute it, by the layer's own modules."""

    def forward(self: Any, x: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Tensor:
        parts, cache = _Layer(self), seam.pop_cache(kwargs)
        attention = parts.attention
        normed = parts.before(x)
        q, k, v = (m(normed).view(*x.shape[:2], -1, attention.head_dim) for m in (parts.q, parts.k, parts.v))
        if parts.q_norm is not None:
            q, k = parts.q_norm(q), parts.k_norm(k)
        q, k = torch.ops.autotune.rotary(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        k, v = cache.update(k, v.transpose(1, 2), attention.layer_idx)
        attend = seam.attention_function(seam.attention_of(attention.config), eager)
        attended, _ = attend(attention, q, k, v, attention_mask, **constants)
        x = x + parts.o(attended.reshape(*x.shape[:2], -1))
        y: Tensor = x + parts.mlp(parts.after(x))
        return y

    return forward


def _recorded(layer: Any, forward: Callable[..., Any], x: Tensor, cache_name: str) -> BlockCall:
    """Record one call of a layer's forward over a cache: keys and values, attention's inputs, and the output."""
    probe = copy.copy(layer)

    def call(attention: nn.Module, hidden_states: Tensor, **given: Any) -> Tensor:
        probe.__dict__["_modules"] = {**layer._modules, "self_attn": attention}
        output = forward(probe, hidden_states, **given)
        if not isinstance(output, Tensor):
            raise TypeError("a decoder layer returns more than its numbers")
        return output

    return recorded(layer.self_attn, x, cache_name, around=call)
