"""Attention and gated feed-forward blocks whose projections of one input are one matmul.

Three matmuls over one token read their weights in three kernels, each too short to reach the memory's full bandwidth.
Merged, they are one kernel. A block is recognised by what it does: the inputs of its cache and its attention function
are recorded, and its replacement must pass on the same.
"""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model import linear_layers, seam

SPY = "autotune_spy"  # name of an attention function that records its inputs
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # largest relative error of a reordered sum
# Sizes of inputs to compare a block with its replacement at: a clip shows at large ones alone. FP16 ends at 65504.
SIZES = {torch.float32: (1.0, 1e4), torch.float16: (1.0, 16.0), torch.bfloat16: (1.0, 1e4)}
CONSTANT = (int, float, bool, type(None))
ATTENTION, NORMED = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}

_calls: ContextVar[list[BlockCall] | None] = ContextVar("what the spy noted", default=None)


class MergedAttention(nn.Module):
    """An attention block with one projection for queries, keys and values.

    Args:
        block: the block it replaces; its other layers, its settings and its tensors are shared.
        names: the globals of its forward, with the model's own functions for rotary embeddings and eager attention.
        constants: what the block passes to its attention function besides the tensors: scaling, window, ...
    """

    config: Any
    layer_idx: int
    head_dim: int

    def __init__(self, block: Any, names: Mapping[str, Any], constants: dict[str, Any]) -> None:
        super().__init__()
        own = {key: value for key, value in vars(block).items() if not key.startswith("_") and key != "training"}
        self.__dict__.update(own)  # config, layer_idx, head_dim, is_causal, num_key_value_groups, ...
        parts = [block.q_proj, block.k_proj, block.v_proj]
        self.sizes = [part.out_features for part in parts]
        self.qkv_proj = merge(parts)
        self.o_proj = block.o_proj
        self.q_norm, self.k_norm = (getattr(block, name, None) for name in ("q_norm", "k_norm"))
        self._rotate: Callable[..., Any] = names[seam.ROTARY]
        self._eager: Callable[..., Any] = names[seam.EAGER]
        self._constants = constants

    def forward(
        self,
        hidden_states: Tensor,  # [B, S, H]
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = seam.pop_cache(kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (part.view(shape) for part in self.qkv_proj(hidden_states).split(self.sizes, -1))
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        q, k = self._rotate(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)  # [B, heads, S, D]
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = seam.attention_function(seam.attention_of(self.config), self._eager)
        out, weights = attend(self, q, k, v, attention_mask, **kwargs, **self._constants)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class MergedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)) with one projection for gate and up."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate_up_proj = merge([block.gate_proj, block.up_proj])
        self.down_proj = block.down_proj
        self.act_fn = block.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        y: Tensor = self.down_proj(self.act_fn(gate) * up)
        return y


def merge(parts: list[nn.Linear]) -> nn.Linear:
    """Merge linear layers over one input into one [sum of outputs, inputs]. The weights are copied."""
    merged = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=False, device="meta")
    merged.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
    if parts[0].bias is not None:
        merged.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
    return merged.eval()


def stand_in(module: nn.Module) -> nn.Module | None:
    """The merged form of a block, checked on random numbers, or None if it has none."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None  # hooks or a replaced forward change what a call does
    children = {name for name, child in module.named_children()}
    if children == MLP and mergeable(module, "gate_proj", "up_proj"):
        return _proven_mlp(module)
    if children in (ATTENTION, ATTENTION | NORMED) and mergeable(module, "q_proj", "k_proj", "v_proj"):
        return _proven_attention(module)
    return None


def mergeable(module: nn.Module, *names: str) -> bool:
    """Whether projections are plain linear layers of one kind."""
    parts = [module.get_submodule(name) for name in names]
    if any(linear_layers.as_linear(part) is not part for part in parts):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts):
        return False
    kinds = {(p.in_features, p.weight.dtype, p.weight.device, p.bias is None) for p in parts}
    return len(kinds) == 1 and next(iter(kinds))[1] in CLOSE


@dataclass
class BlockCall:
    """The inputs of a block's cache and attention function, and the block's output."""

    tensors: list[Tensor] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    cached: list[Any] = field(default_factory=list)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Act as a cache: record the layer under which keys and values are to be stored."""
        self.cached = seam.update_layer(args, kwargs)
        return key, value

    def is_like(self, other: BlockCall, layer: int) -> bool:
        """Whether both calls stored under this layer, passed on the same and gave the same."""
        alike = self.constants == other.constants and self.cached == other.cached == [layer]
        return alike and all(is_close(a, b) for a, b in itertools.zip_longest(self.tensors, other.tensors))


def _proven_mlp(block: Any) -> MergedMlp | None:
    new, x = MergedMlp(block), random_like(block.gate_proj.weight, 1, 3, block.gate_proj.in_features)
    try:
        return new if all(is_close(block(size * x), new(size * x)) for size in SIZES[x.dtype]) else None
    except (RuntimeError, TypeError, ValueError):
        return None


def _proven_attention(block: Any) -> MergedAttention | None:
    forward = seam.forward_function(block)
    names, cache_name = getattr(forward, "__globals__", {}), seam.cache_argument(forward)
    if (
        cache_name is None
        or not {seam.ROTARY, seam.EAGER} <= names.keys()
        or not all(hasattr(block, n) for n in ("config", "layer_idx", "head_dim"))
    ):
        return None
    weight = block.q_proj.weight
    x = random_like(weight, 1, 3, block.q_proj.in_features)
    try:
        expected = recorded(block, x, cache_name)
        if any(type(value) not in CONSTANT for value in expected.constants.values()):
            return None
        new = MergedAttention(block, names, expected.constants)
        for size in SIZES[x.dtype]:
            expected, got = (recorded(each, size * x, cache_name) for each in (block, new))
            if not expected.is_like(got, block.layer_idx):
                return None
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # it does not take the inputs of an attention block
    return new


def recorded(block: Any, x: Tensor, cache_name: str, around: Callable[..., Tensor] | None = None) -> BlockCall:
    """Record one call of an attention block over a cache, as its attention function sees it. The block is unchanged.

    Args:
        around: calls, instead of the block, what encloses it: takes a block to use instead of this one and the
            arguments by name, and returns the output. None: the block is called.
    """
    seam.register_attention(SPY, _spy, masks=False)
    probe = copy.copy(block)
    probe.__dict__["config"] = seam.with_attention(block.config, SPY)
    if isinstance(forward := probe.__dict__.get("forward"), types.MethodType):
        probe.__dict__["forward"] = types.MethodType(forward.__func__, probe)
    size = block.head_dim
    positions = (random_like(x, 1, x.shape[1], size), random_like(x, 1, x.shape[1], size).flip(-1))
    call, calls = BlockCall(), list[BlockCall]()
    given = {"hidden_states": x, "position_embeddings": positions, "attention_mask": None, cache_name: call}
    token = _calls.set(calls)
    try:
        out = probe(**given)[0] if around is None else around(probe, **given)
    finally:
        _calls.reset(token)
    (seen,) = calls
    return BlockCall([*seen.tensors, out], seen.constants, call.cached)


def _spy(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    calls = _calls.get()
    if calls is not None:
        calls.append(BlockCall([query, key, value], kwargs))
    groups = query.shape[1] // key.shape[1]
    out = query + key.repeat_interleave(groups, 1) * value.repeat_interleave(groups, 1)  # a cheap function of all three
    return out.transpose(1, 2).contiguous(), None


def is_close(expected: Tensor | None, got: Tensor | None) -> bool:
    if expected is None or got is None or expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    a, b = expected.float(), got.float()
    return bool((a - b).norm() <= CLOSE[expected.dtype] * a.norm())


def random_like(like: Tensor, *shape: int) -> Tensor:
    draw = torch.Generator(device="cpu").manual_seed(len(shape))
    numbers = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
    return numbers.to(like.device, like.dtype)
