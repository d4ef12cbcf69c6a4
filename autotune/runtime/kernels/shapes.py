"""The shapes and dtypes that the operators return, for tracing without numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def register() -> None:
    """Register the operators' shapes for torch.compile and fake tensors. The library must be loaded."""
    torch.library.register_fake("autotune::linear_f16", _linear_f16)
    torch.library.register_fake("autotune::linear_i8", _linear_i8)
    torch.library.register_fake("autotune::linear_i6", _linear_i6)
    torch.library.register_fake("autotune::linear_i4", _linear_i4)
    torch.library.register_fake("autotune::linear_bf16", _linear_bf16)
    torch.library.register_fake("autotune::linear_mlp", _linear_mlp)
    torch.library.register_fake("autotune::linear_mlp_rounded", _linear_mlp)
    for suffix in ("", "_rounded", "_floats"):
        torch.library.register_fake(f"autotune::layer_heads{suffix}", _layer_heads)
        torch.library.register_fake(f"autotune::layer_end{suffix}", lambda x, *args: torch.empty_like(x))
        torch.library.register_fake(f"autotune::layers{suffix}", _layers)
    torch.library.register_fake("autotune::rms_norm", lambda x, weight, eps: torch.empty_like(x))
    torch.library.register_fake("autotune::gate_up", lambda gate, up, activation: torch.empty_like(gate))
    torch.library.register_fake("autotune::rotary", lambda q, k, cosines, sines: (_by_token(q), _by_token(k)))
    torch.library.register_fake("autotune::attend_one", _attend_one)
    torch.library.register_fake("autotune::attend_many", _attend_many)
    torch.library.register_fake("autotune::packed_rows", _packed_rows)


def _linear_f16(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_i8(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, digits: int = 2
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_i6(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, digits: int = 2
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_i4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    digits: int = 2,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_bf16(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    parts: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_mlp(
    x: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    hidden: int,
    out_features: int,
    activation: int,
    precision: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _layer_heads(
    x: Tensor,
    norm: Tensor,
    eps: float,
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    head_eps: float,
    out_features: int,
    key_features: int,
    cosines: Tensor,
    sines: Tensor,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    depth = cosines.shape[-1]
    shapes = ((*x.shape[:2], features // depth, depth) for features in (out_features, key_features, key_features))
    queries, keys, values = (x.new_empty(shape).transpose(1, 2) for shape in shapes)
    return queries, keys, values


def _layers(
    x: Tensor,
    table: Tensor,
    layers: int,
    key_features: int,
    cosines: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    depth = cosines.shape[-1]
    shape = layers, *x.shape[:2], key_features // depth, depth
    keys, values = (x.new_empty(shape).transpose(2, 3) for _ in range(2))
    return torch.empty_like(x), keys, values


def _by_token(t: Tensor) -> Tensor:
    """An empty [B, H, Q, D] that is stored as [B, Q, H, D]."""
    return torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _attend_many(q: Tensor, keys: Tensor, values: Tensor, spans: Tensor | None, scale: float, parts: int) -> Tensor:
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, values.shape[-1]))


def _attend_one(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    batch, heads, _, depth = q.shape
    return q.new_empty((batch, 1, heads, depth))


def _packed_rows(
    ids: Tensor, packed: Tensor, scales: Tensor | None, zeros: Tensor | None, rows: int, width: int
) -> Tensor:
    return ids.new_empty((*ids.shape, width), dtype=torch.float32)
