"""Damage for the quality gate to find: each is done to a twin of a model and never to the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from autotune.model import seam
from autotune.runtime.variant import Stage, Transform, Variant

Damage = Callable[[Any], None]  # edits a module
Change = Callable[[torch.Tensor, int, dict[str, Any]], torch.Tensor]  # logits [B, S, V], call, arguments -> logits


class InapplicableError(Exception):
    """This architecture has nothing that such damage could be done to."""


@dataclass(frozen=True)
class Corruption:
    """One way to be wrong.

    Args:
        name: in words.
        how: does it to a module.
        fault: its number in the list of faults.
        blatant: no tier may let it pass, whatever its divergence; for the others the divergence that they really
            cause decides.
        says: what the gate's reason contains where every tier's reason does.
    """

    name: str
    how: Damage
    fault: str
    blatant: bool = False
    says: str = ""


@dataclass(frozen=True)
class Edit(Transform):
    """Whatever is to be done to a phase's module."""

    do: Damage = lambda module: None

    name: ClassVar[str] = "edit"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "damage done on purpose"

    def apply(self, variant: Variant) -> None:
        for module in variant.edit(self.phase):
            self.do(module)


def edited(model: Any, do: Damage, phase: Any = "decode") -> Variant:
    """A variant of `model` whose module for `phase` was edited."""
    return Variant(model).with_transform(Edit(phase, do))


# How to get at a module


def replace_weight(linear: Any, weight: torch.Tensor) -> None:
    linear.weight = nn.Parameter(weight, requires_grad=False)  # never in place: the tensor is the original's


def rewrap(module: Any, change: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> None:
    """Let `change(forward, kwargs)` stand in for the module's forward."""
    inner = module.forward
    module.forward = lambda *args, **kwargs: change(inner, {**kwargs, **({"input_ids": args[0]} if args else {})})


def layers(module: Any) -> nn.ModuleList:
    count = module.config.num_hidden_layers
    for found in module.modules():
        if isinstance(found, nn.ModuleList) and len(found) == count:
            return found
    raise InapplicableError("no list of layers")


def linears(module: Any) -> list[tuple[str, Any]]:
    """Layers with a weight matrix, Conv1D among them."""
    return [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def attention_output(layer: Any) -> Any:
    ends = ("o_proj", "out_proj", "attention.dense", "attn.c_proj")
    for name, linear in linears(layer):
        if name.endswith(ends):
            return linear
    raise InapplicableError("no output projection of attention")


# Weights


def scaled(factor: float, layer: int = -1) -> Damage:
    """All weights of one layer, times `factor`."""

    def do(module: Any) -> None:
        for _, linear in linears(layers(module)[layer]):
            replace_weight(linear, linear.weight * factor)

    return do


def noisy(share: float) -> Damage:
    """Noise on every weight of every layer, relative to the matrix' own spread."""

    def do(module: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for layer in layers(module):
            for _, linear in linears(layer):
                weight = linear.weight
                noise = torch.randn(weight.shape, generator=generator) * share * weight.std()
                replace_weight(linear, weight + noise.to(weight))

    return do


def rounded(bits: int, layer: int = -1) -> Damage:
    """One layer's weights on a grid of 2^bits steps a matrix, as a quantiser without groups would leave them."""

    def do(module: Any) -> None:
        for _, linear in linears(layers(module)[layer]):
            step = linear.weight.abs().max() / (2 ** (bits - 1) - 1)
            replace_weight(linear, (linear.weight / step).round() * step)

    return do


def zeroed_head(module: Any) -> None:
    output = attention_output(layers(module)[0])
    columns = output.weight.shape[0 if type(output).__name__ == "Conv1D" else 1]
    width = columns // module.config.num_attention_heads
    weight = output.weight.clone()
    if type(output).__name__ == "Conv1D":
        weight[:width] = 0
    else:
        weight[:, :width] = 0
    replace_weight(output, weight)


def swapped_rows(first: int, second: int) -> Damage:
    """Two tokens exchanged in the output layer."""

    def do(module: Any) -> None:
        head = module.get_output_embeddings()
        weight = head.weight.clone()
        weight[[first, second]] = weight[[second, first]]
        replace_weight(head, weight)

    return do


def dropped_layer(module: Any) -> None:
    """The last layer adds nothing."""
    for name, linear in linears(layers(module)[-1]):
        if name.endswith(("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2")):
            replace_weight(linear, torch.zeros_like(linear.weight))


def warped_rotation(factor: float) -> Damage:
    """Another base of the rotary embedding."""

    def do(module: Any) -> None:
        found = [m for m in module.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
        if not found:
            raise InapplicableError("no rotary embedding")
        for rotary in found:
            rotary.inv_freq = rotary.inv_freq * factor

    return do


# Logits


def with_logits(change: Change) -> Damage:
    """A corruption of the logits [B, S, V] alone; `change` gets a clone and the number of the call."""

    def do(module: Any) -> None:
        calls: list[None] = []

        def forward(inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
            out = inner(**kwargs)
            calls.append(None)
            out.logits = change(out.logits.clone(), len(calls), kwargs)
            return out

        rewrap(module, forward)

    return do


def nan_once(logits: torch.Tensor, call: int, kwargs: dict[str, Any]) -> torch.Tensor:
    if call == 70:
        logits[0, -1, 17] = math.nan
    return logits


def infinite_row(logits: torch.Tensor, call: int, kwargs: dict[str, Any]) -> torch.Tensor:
    return torch.full_like(logits, math.inf) if call == 5 else logits


def constant_token(logits: torch.Tensor, call: int, kwargs: dict[str, Any]) -> torch.Tensor:
    return nn.functional.one_hot(torch.full(logits.shape[:-1], 7), logits.shape[-1]).float() * 30


def all_equal(logits: torch.Tensor, call: int, kwargs: dict[str, Any]) -> torch.Tensor:
    return torch.zeros_like(logits)


def huge(logits: torch.Tensor, call: int, kwargs: dict[str, Any]) -> torch.Tensor:
    return logits * 1e30


def instant_eos(module: Any) -> None:
    eos = module.generation_config.eos_token_id
    token = eos[0] if isinstance(eos, list) else eos

    def change(logits: torch.Tensor, call: int, kwargs: dict[str, Any]) -> torch.Tensor:
        logits[..., token] = logits.amax(-1) + 0.01
        return logits

    with_logits(change)(module)


def wrong_shape(logits: torch.Tensor, call: int, kwargs: dict[str, Any]) -> torch.Tensor:
    return logits[..., :-1]


def wrong_dtype(logits: torch.Tensor, call: int, kwargs: dict[str, Any]) -> torch.Tensor:
    return logits.to(torch.int32)


def wrong_batch(logits: torch.Tensor, call: int, kwargs: dict[str, Any]) -> torch.Tensor:
    return logits.roll(1, dims=0)


def tempered(factor: float) -> Damage:
    return with_logits(lambda logits, call, kwargs: logits * factor)


def held_over(module: Any) -> None:
    """The logits of the step before, as of an output buffer that is overwritten too late."""
    held: dict[tuple[int, ...], torch.Tensor] = {}

    def change(logits: torch.Tensor, call: int, kwargs: dict[str, Any]) -> torch.Tensor:
        before = held.get(tuple(logits.shape), logits)
        held[tuple(logits.shape)] = logits
        return before

    with_logits(change)(module)


# Positions, masks and caches


def shifted_padding(module: Any) -> None:
    """Off by one in the position ids, wherever something is padded."""

    def forward(inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and bool((mask == 0).any()):
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return inner(**kwargs)

    rewrap(module, forward)


def shifted_steps(module: Any) -> None:
    """Off by one in the position ids of every decoding step."""

    def forward(inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("position_ids") is None:
            raise InapplicableError("no position ids")
        return inner(**{**kwargs, "position_ids": kwargs["position_ids"] + 1})

    rewrap(module, forward)


def unmasked_padding(module: Any) -> None:
    """Padding is attended to."""

    def forward(inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            kwargs["attention_mask"] = torch.ones_like(mask)
        return inner(**kwargs)

    rewrap(module, forward)


def stale_cache(module: Any) -> None:
    """From the second sequence on, part of the cache is still the first one's."""
    first: list[Any] = []

    def forward(inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        cache = seam.cache_in(kwargs)
        if not first:
            first.append((id(cache), [layer.keys[:1, :, :8].clone() for layer in cache.layers], cache))
        elif cache is not first[0][2]:
            for layer, old in zip(cache.layers, first[0][1], strict=True):
                layer.keys = torch.cat([old.expand(layer.keys.shape[0], -1, -1, -1), layer.keys[:, :, 8:]], dim=2)
        return inner(**kwargs)

    rewrap(module, forward)


def past_boundary(length: int) -> Damage:
    """Wrong once the context is longer than `length` tokens."""

    def do(module: Any) -> None:
        def forward(inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
            out = inner(**kwargs)
            if seam.cache_in(kwargs).get_seq_length() > length:
                out.logits = out.logits.roll(1, dims=-1)
            return out

        rewrap(module, forward)

    return do


def worse_with_length(size: float) -> Damage:
    """An error in the cache that grows with the context and only matters when that is long."""

    def do(module: Any) -> None:
        def forward(inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
            for layer in seam.cache_in(kwargs).layers:
                grown = size * max(0, layer.keys.shape[2] - 200) / 200
                wave = torch.sin(torch.arange(layer.keys.numel()).reshape(layer.keys.shape))
                layer.keys = layer.keys + grown * wave
            return inner(**kwargs)

        rewrap(module, forward)

    return do


def coarse_cache(bits: int) -> Damage:
    """Keys and values on a grid of 2^bits steps a tensor."""

    def do(module: Any) -> None:
        def forward(inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
            for layer in seam.cache_in(kwargs).layers:
                for name in ("keys", "values"):
                    held = getattr(layer, name)
                    step = held.abs().max() / (2 ** (bits - 1) - 1)
                    setattr(layer, name, (held / step).round() * step)
            return inner(**kwargs)

        rewrap(module, forward)

    return do


CORRUPTIONS: tuple[Corruption, ...] = (
    Corruption("scales x1.02 in one layer", scaled(1.02), "A8", says="KLD"),
    Corruption("scales x1.1 in one layer", scaled(1.1), "A8"),
    Corruption("scales x0.9 in the first layer", scaled(0.9, layer=0), "A8"),
    Corruption("noise of 1 % on all weights", noisy(0.01), "A8"),
    Corruption("noise of 3 % on all weights", noisy(0.03), "A8"),
    Corruption("noise of 10 % on all weights", noisy(0.1), "A8"),
    Corruption("one layer rounded to 6 bits", rounded(6), "A8"),
    Corruption("one layer rounded to 4 bits", rounded(4), "A8"),
    Corruption("zeroed head", zeroed_head, "A8", says="KLD"),
    Corruption("swapped rows in lm_head", swapped_rows(10, 11), "A8", says="KLD"),
    Corruption("comma and full stop swapped in lm_head", swapped_rows(28, 30), "A8"),
    Corruption("dropped layer", dropped_layer, "A2"),
    Corruption("rotary frequencies x0.97", warped_rotation(0.97), "A9"),
    Corruption("NaN on one token", with_logits(nan_once), "A4", blatant=True, says="NaN logits at token"),
    Corruption("infinite row", with_logits(infinite_row), "A5", blatant=True, says="infinite logits at token"),
    Corruption("all logits equal", with_logits(all_equal), "A5", blatant=True, says="all logits equal"),
    Corruption("huge logits", with_logits(huge), "A5", blatant=True),
    Corruption("constant token", with_logits(constant_token), "A6", blatant=True, says="KLD"),
    Corruption("instant EOS", instant_eos, "A7", blatant=True, says="KLD"),
    Corruption("wrong shape", with_logits(wrong_shape), "A3", blatant=True, says="shape"),
    Corruption("wrong dtype", with_logits(wrong_dtype), "A3", blatant=True),
    Corruption("logits x1.05", tempered(1.05), "A8"),
    Corruption("logits x1.3", tempered(1.3), "A8"),
    Corruption("logits of the step before", held_over, "A20", blatant=True),
    Corruption("wrong at batch > 1", with_logits(wrong_batch), "A11", says="padded-batch"),
    Corruption("RoPE off by one under padding", shifted_padding, "A9", says="padded-batch"),
    Corruption("positions off by one in every step", shifted_steps, "A9"),
    Corruption("padding attended to", unmasked_padding, "A9", says="padded-batch"),
    Corruption("stale cache on the second prompt", stale_cache, "A10", says="second-prompt"),
    Corruption("wrong beyond a block of 64", past_boundary(64), "A11", says="KLD"),
    Corruption("wrong beyond a block of 256", past_boundary(256), "A11", says="long"),
    Corruption("cache error that grows with context", worse_with_length(0.5), "A12", says="long"),
    Corruption("cache rounded to 8 bits", coarse_cache(8), "A12"),
    Corruption("cache rounded to 4 bits", coarse_cache(4), "A12"),
)
BY_NAME = {corruption.name: corruption for corruption in CORRUPTIONS}
