"""A decoder layer of prefill as two operators, with the cache and attention between them.

A short prompt spends a fifth of its time between operators. The layer's own modules stay where they are: they hold the
weights, and they compute whenever the operators cannot, for example while hooks watch them. A layer is recognised by
what it computes: its modules, put together as the operators do it, must give the same numbers.
"""

from __future__ import annotations

import copy
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model import seam
from .kernels.bf16 import FEW, Bf16Linear
from .kernels.fused import GatedMlp, RmsNorm
from .kernels.modules import GroupedLinear, HalfLinear
from .merged_blocks import ATTENTION, CONSTANT, NORMED, BlockCall, random_like, recorded

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
FUSED = "autotune_fused_layer"  # of the forwards that are made here: what they pass to attention besides tensors


class WholeStack(ABC):
    """A forward under way of the module that calls the layers."""

    @abstractmethod
    def result(self, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What a layer returns; None: it computes that."""


around: ContextVar[WholeStack | None] = ContextVar("the forward that calls the layers", default=None)


class Products(NamedTuple):
    """How all of a layer's products are computed.

    Args:
        heads, end: the operators before and after attention.
        all: the operator for all layers.
        number: digits of the inputs in integers, or their parts in BF16; 0 for FP32.
        layers: that multiply, for q, k, v, o, gate, up and down.
    """

    heads: Callable[..., tuple[Tensor, Tensor, Tensor]]
    end: Callable[..., Tensor]
    all: Callable[..., tuple[Tensor, Tensor, Tensor]]
    number: int
    layers: list[Any]


class LayerParts:
    """The modules of a decoder layer whose parts have been exchanged."""

    def __init__(self, layer: Any) -> None:
        held = layer._modules  # an attribute of a module takes ten times as long
        self.before, self.after = held["input_layernorm"], held["post_attention_layernorm"]
        self.attention, self.mlp = held["self_attn"], held["mlp"]
        inner, gated = self.attention._modules, self.mlp._modules
        self.linear = [inner[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        self.linear += [gated[name] for name in ("gate_proj", "up_proj", "down_proj")]
        self.q_norm, self.k_norm = inner.get("q_norm"), inner.get("k_norm")

    @classmethod
    def of(cls, layer: Any) -> LayerParts | None:
        """The layer's modules if calling them one by one would do no more than the operators do, else None."""
        try:
            found = cls(layer)
        except KeyError:  # one of its parts is of another kind by now
            return None
        return found if found._are_as_exchanged() else None

    @property
    def norms(self) -> list[Any]:
        return [norm for norm in (self.before, self.after, self.q_norm, self.k_norm) if norm is not None]

    @property
    def modules(self) -> list[Any]:
        """All of them; the first is attention."""
        return [self.attention, self.mlp, *self.norms, *self.linear]

    def _are_as_exchanged(self) -> bool:
        _, *called = self.modules
        return (
            not any(m._forward_hooks or m._forward_pre_hooks for m in self.modules)
            and all(type(norm) is RmsNorm for norm in self.norms)
            and type(self.mlp) is GatedMlp
            and not self.attention.training
            and hasattr(self.attention.__dict__.get("forward"), seam.ROTARY)
            and not any("forward" in m.__dict__ for m in called)
        )

    def products(self, tokens: int) -> Products | None:
        """How the operators multiply that number of tokens by this layer's weights; None if they cannot."""
        layers: list[Any] = [m.serving(tokens) if isinstance(m, Bf16Linear) else m for m in self.linear]
        q, k, v, _, gate, up, _ = layers
        if isinstance(q, Bf16Linear):
            if all(isinstance(m, Bf16Linear) and m.parts == q.parts for m in layers) and tokens >= FEW:
                return _products("", q.parts, layers)
        elif isinstance(q, GroupedLinear) and q.in_integers:
            alike = all(isinstance(m, GroupedLinear) and m.digits == q.digits for m in layers)
            if alike and q.rounds_like(k) and q.rounds_like(v) and gate.rounds_like(up):
                return _products("_rounded", q.digits, layers)
        elif all(isinstance(m, HalfLinear) for m in layers):
            return _products("_floats", 0, layers)
        return None


def _products(family: str, number: int, layers: list[Any]) -> Products:
    return Products(*_operators(family), number, layers)


def _operators(family: str) -> tuple[Any, Any, Any]:
    """The operators of a family of products: before attention, after it, and for all layers."""
    heads, end, every = (getattr(torch.ops.autotune, name + family) for name in ("layer_heads", "layer_end", "layers"))
    return heads.default, end.default, every.default


def fused_forward(layer: nn.Module) -> types.FunctionType | None:
    """A forward for a decoder layer whose parts have been exchanged, or None if it is of no known form."""
    if {name for name, _ in layer.named_children()} != LAYER or "forward" in vars(layer):
        return None
    attention: Any = layer.self_attn
    if {name for name, _ in attention.named_children()} not in (ATTENTION, ATTENTION | NORMED):
        return None
    parts, cache_name = LayerParts.of(layer), seam.cache_argument(seam.forward_function(attention))
    if parts is None or parts.linear[1].out_features != parts.linear[2].out_features:  # of k and v
        return None
    if cache_name is None or not all(hasattr(attention, name) for name in ("config", "layer_idx", "head_dim")):
        return None
    eager, own = attention.forward.__func__.__globals__.get(seam.EAGER), type(layer).forward
    x = random_like(parts.before.weight, 1, 3, len(parts.before.weight))
    try:
        expected = _recorded(layer, own, x, cache_name)
        if eager is None or any(type(value) not in CONSTANT for value in expected.constants.values()):
            return None
        got = _recorded(layer, _composed(eager, expected.constants), x, cache_name)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # it does not take the inputs of a decoder layer
    return _forward(own, eager, expected.constants) if expected.is_like(got, attention.layer_idx) else None


def _forward(own: Callable[..., Any], eager: seam.Attend, constants: Mapping[str, Any]) -> types.FunctionType:
    """The layer's forward by the operators, and its class's `own` one where they cannot be used."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        stack = around.get()
        if stack is not None and not args and (whole := stack.result(self, hidden_states, kwargs)) is not None:
            return whole
        parts, angles = LayerParts.of(self), kwargs.get("position_embeddings")
        if args or parts is None or angles is None or not fits(parts, hidden_states, angles):
            return own(self, hidden_states, *args, **kwargs)
        products = parts.products(hidden_states.shape[0] * hidden_states.shape[1])
        if products is None:
            return own(self, hidden_states, **kwargs)
        attention, given = parts.attention, dict(kwargs)
        del given["position_embeddings"]
        mask, cache = given.pop("attention_mask", None), seam.pop_cache(given)
        if cache is not None and not seam.appends(cache, attention.layer_idx):
            return own(self, hidden_states, **kwargs)
        before, (o, *gated) = products.layers[:3], products.layers[3:]
        q, k, v = products.heads(
            hidden_states,
            parts.before.weight,
            parts.before.eps,
            *(m.stored for m in before),
            *(m.bias for m in before),
            *(None if m is None else m.weight for m in (parts.q_norm, parts.k_norm)),
            0.0 if parts.q_norm is None else parts.q_norm.eps,
            *(m.out_features for m in before[:2]),
            *angles,
            products.number,
        )
        if cache is not None:
            k, v = cache.update(k, v, attention.layer_idx)
        attend = seam.attention_function(seam.attention_of(attention.config), eager)
        attended, _ = attend(attention, q, k, v, mask, **{**constants, **given})
        return products.end(
            hidden_states,
            attended,
            o.stored,
            o.bias,
            parts.after.weight,
            parts.after.eps,
            *(m.stored for m in gated),
            *(m.bias for m in gated),
            gated[0].out_features,
            parts.mlp.activation,
            products.number,
        )

    setattr(forward, FUSED, dict(constants))
    return forward  # type: ignore[return-value]


def fits(parts: LayerParts, x: Tensor, angles: Any) -> bool:
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
        parts, cache = LayerParts(self), seam.pop_cache(kwargs)
        attention = parts.attention
        normed = parts.before(x)
        q, k, v = (m(normed).view(*x.shape[:2], -1, attention.head_dim) for m in parts.linear[:3])
        if parts.q_norm is not None:
            q, k = parts.q_norm(q), parts.k_norm(k)
        q, k = torch.ops.autotune.rotary(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        k, v = cache.update(k, v.transpose(1, 2), attention.layer_idx)
        attend = seam.attention_function(seam.attention_of(attention.config), eager)
        attended, _ = attend(attention, q, k, v, attention_mask, **constants)
        x = x + parts.linear[3](attended.reshape(*x.shape[:2], -1))
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
