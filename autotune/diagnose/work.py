"""Count the FLOPs and bytes of one forward pass, from the modules and the configuration, without measuring.

The matmuls over weights and attention's two products are counted. Element-wise work, recurrent scans and the traffic of
activations are left out. Weights move once per forward, as stored. Of an embedding, only the rows that are looked up
move; of a mixture, only the experts that even routing is expected to choose. Keys and values of earlier tokens are read
once, those of the new tokens are written once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..machine.roofline import kv_cache_bytes, matmul_flops
from ..model import seam, sharding
from ..model.configured import text_config, vocabulary
from .parts import ATTENTION, CACHE, HEAD, NORM, OTHER, owner, sections

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one part of a forward pass."""

    flops: float = 0.0
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
        )


@dataclass(frozen=True)
class Forward:
    """The shape of one forward pass.

    Args:
        batch: sequences.
        new: tokens per sequence to compute.
        past: tokens per sequence already in the cache.
    """

    batch: int
    new: int
    past: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.new


@dataclass(frozen=True)
class Keys:
    """The shape of one layer's attention and of its cache.

    Args:
        heads: query heads.
        kv_heads: key and value heads.
        head_size: elements of a head.
        window: most tokens that the layer looks back; None without a limit.
    """

    heads: int
    kv_heads: int
    head_size: int
    window: int | None = None

    def part(self, ranks: int) -> Keys:
        """The heads that one of `ranks` ranks computes."""
        return replace(self, heads=max(1, self.heads // ranks), kv_heads=max(1, self.kv_heads // ranks))

    def pairs(self, forward: Forward) -> int:
        """Count the query-key pairs of one sequence under a causal mask."""
        past, new = forward.past, forward.new
        window = self.window or past + new
        growing = min(max(window - past, 0), new)  # new tokens whose whole past is within the window
        return growing * past + growing * (growing + 1) // 2 + (new - growing) * window

    def flops(self, forward: Forward) -> int:
        """Count the FLOPs of scores and weighted values: two products over every pair, in every query head."""
        return 2 * matmul_flops(1, self.pairs(forward), self.head_size) * self.heads * forward.batch

    def bytes(self, forward: Forward, element_bytes: int) -> tuple[float, float]:
        """Return the bytes of earlier tokens that are read, and of new tokens that are written."""
        past = min(forward.past, self.window - 1) if self.window else forward.past  # the window includes the token
        one = kv_cache_bytes(forward.batch, 1, self.kv_heads, self.head_size, element_bytes)
        return past * one, forward.new * one


def count(model: PreTrainedModel, forward: Forward, element_bytes: int) -> dict[str, Work]:
    """Count the work of a forward pass by group of the operator table.

    Args:
        model: the module that runs it.
        forward: its shape.
        element_bytes: size of an element of the KV cache.
    """
    found, work = sections(model), dict[str, Work]()
    positions = forward.batch if keeps_last_logits(model) else forward.tokens  # positions whose logits lm_head computes

    def add(group: str, part: Work) -> None:
        work[group] = work.get(group, Work()) + part

    for name, module in _parts(model):
        group = owner(name, found) or OTHER
        add(group, _module_work(name, module, model, positions if group == HEAD else forward.tokens))
    for keys in attention_layers(model):
        read, written = keys.bytes(forward, element_bytes)
        add(ATTENTION, Work(flops=keys.flops(forward), cache_bytes=read))
        add(CACHE, Work(cache_bytes=written))
    return work


def attention_flops(model: PreTrainedModel, forward: Forward) -> int:
    """Return the FLOPs of attention proper, without weights; they are a part of `count`'s FLOPs."""
    return sum(keys.flops(forward) for keys in attention_layers(model))


def cache_size(model: PreTrainedModel, batch: int, tokens: int, element_bytes: int) -> int:
    """Return the bytes of a KV cache that holds `tokens` tokens of each sequence."""
    shape = Forward(batch, 0, tokens)
    return int(sum(sum(keys.bytes(shape, element_bytes)) for keys in attention_layers(model)))


def activation_size(model: PreTrainedModel, forward: Forward, element_bytes: int) -> int:
    """Estimate the peak bytes of activations: the residual stream, the widest layer's input and two outputs, logits.

    A gated FFN, the widest part of most models, holds gate, up and their product at once.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    widths = [shape for _, module in _parts(model) if (shape := linear_shape(module)) and module is not head]
    widest = max((inputs + 2 * outputs for inputs, outputs in widths), default=0)
    hidden = int(text_config(model).hidden_size)
    positions = forward.batch if keeps_last_logits(model) else forward.tokens
    return forward.tokens * (2 * hidden + widest) * element_bytes + positions * vocabulary(model) * (element_bytes + 4)


def copied_weights(model: PreTrainedModel, batch: int) -> int:
    """Return the bytes of lm_head that torch copies in prefill: in BF16 on a CPU, once for each sequence.

    See `transforms.flat_linears`, which avoids it.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    copied = type(head) is nn.Linear and head.weight.dtype == torch.bfloat16 and head.weight.device.type == "cpu"
    return batch * head.weight.nbytes if copied else 0


def attention_layers(model: PreTrainedModel) -> list[Keys]:
    """Return the `Keys` of each layer with a KV cache, from the configuration; others (Mamba) are left out."""
    config = text_config(model)
    layers = seam.layer_configurations(config)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [None] * len(layers)
    kept = zip(kinds, layers, strict=False)
    whole = [keys for kind, layer in kept if (keys := _kept(layer, kind)) is not None]
    return [keys.part(sharding.ranks(model)) for keys in whole]


def query_heads_per_kv_head(model: PreTrainedModel) -> float | None:
    """Return the query heads per key and value head, over all layers; None without a KV cache."""
    layers = attention_layers(model)
    return sum(keys.heads for keys in layers) / sum(keys.kv_heads for keys in layers) if layers else None


def _kept(config: Any, kind: str | None) -> Keys | None:
    """Return the `Keys` of one layer from its configuration; None if it has no KV cache."""
    heads = _first(config, ("num_attention_heads", "n_heads", "n_head"))
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if kind is None:  # the same rule as in transformers' caches
        kind = "sliding_attention" if window else "full_attention"
    if not heads or "attention" not in kind or kind == "linear_attention":
        return None
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    else:
        kv_heads = _first(config, ("num_key_value_heads", "num_kv_heads")) or heads
    size = _first(config, ("head_dim",)) or config.hidden_size // heads
    return Keys(heads, kv_heads, size, window if kind in ("sliding_attention", "chunked_attention") else None)


def compute_dtype(model: PreTrainedModel) -> str:
    """Return what most matmuls compute in: what a replaced layer states as `arithmetic` or `dtype`, or activations'."""
    usual, sizes = str(activation_dtype(model)), dict[str, int]()
    for _, module in _parts(model):
        if shape := linear_shape(module):
            own = getattr(module, "arithmetic", None) or getattr(module, "dtype", None)
            name = str(own) if isinstance(own, (str, torch.dtype)) else usual
            sizes[name] = sizes.get(name, 0) + shape[0] * shape[1]
    return max(sizes, key=lambda name: sizes[name], default=usual).removeprefix("torch.")


def activation_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype between layers and in the KV cache: that of the norms, which quantisation does not change."""
    found = sections(model)
    norms = (p for name, p in model.named_parameters() if owner(name.rpartition(".")[0], found) == NORM)
    return next((p.dtype for p in norms if p.dtype.is_floating_point), model.dtype)


def keeps_last_logits(model: PreTrainedModel) -> bool:
    """Return whether generate asks the model for the logits of the last position only."""
    return seam.keeps_last_logits(model)


def stored_weights(*models: nn.Module) -> int:
    """Return the bytes of the distinct storages that models hold, and of weights outside parameters and buffers."""
    storages, hidden = dict[int, int](), dict[int, float]()
    for module in chain.from_iterable(model.modules() for model in models):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in chain.from_iterable(map(tensors_within, own)):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        if not own and linear_shape(module):
            hidden[id(module)] = _linear_bytes(module, 0)
    return int(sum(storages.values()) + sum(hidden.values()))


def tensors_within(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that a tensor consists of here: itself, or those inside a subclass (torchao, DTensor)."""
    tensor = sharding.local(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from tensors_within(getattr(tensor, name))
    else:
        yield tensor


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return a tensor's bytes as stored."""
    return sum(t.numel() * t.element_size() for t in tensors_within(tensor))


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of any kind of linear layer; None for other modules."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    weight = getattr(module, "weight", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        part = sharding.local(weight)
        return (inputs, outputs) if part is weight else (part.shape[1], part.shape[0])  # a rank's part of a layer
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):  # GPT-2's: weight [inputs, outputs]
        return weight.shape[0], weight.shape[1]
    return None


def matrices(models: Iterable[PreTrainedModel]) -> dict[tuple[int, int], str | None]:
    """Map (inputs, outputs) of the linear layers to their group; None if several groups have that shape."""
    groups = dict[tuple[int, int], str | None]()
    for model in models:
        found = sections(model)
        for name, module in _parts(model):
            if shape := linear_shape(module):
                group = owner(name, found) or OTHER
                groups[shape] = group if groups.get(shape, group) == group else None
    return groups


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that hold tensors themselves. One with `weight_bytes` stands for all modules inside it."""
    stated: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in stated):
            continue
        if hasattr(module, "weight_bytes"):
            stated.append(f"{name}.")
            yield name, module
        elif linear_shape(module) or next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _module_work(name: str, module: nn.Module, model: PreTrainedModel, tokens: int) -> Work:
    own = sum(stored_bytes(p) for p in module.parameters(recurse=False))
    if isinstance(module, nn.Embedding):
        rows = min(tokens, module.num_embeddings)
        return Work(weight_bytes=rows * own / module.num_embeddings)
    if shape := linear_shape(module):
        flops, size = matmul_flops(tokens, shape[1], shape[0]), _linear_bytes(module, own)
        if _EXPERT.search(name):
            used, chosen = _routing(model, tokens)
            return Work(flops * used, size * chosen)
        return Work(flops, size)
    if isinstance(module, nn.Conv1d):
        return Work(2 * module.weight.numel() * tokens, own)
    experts = _first(text_config(model), _EXPERTS)
    tensors = [p for p in module.parameters(recurse=False) if p.dim() > 1 and p.shape[0] == experts]
    if stacked := [p for p in tensors if p.dim() == 3]:  # [E, out, in]
        used, chosen = _routing(model, tokens)
        return Work(sum(2 * p.numel() for p in stacked) * tokens * used, own * chosen)
    return Work(sum(2 * p.numel() for p in tensors) * tokens, own)  # a router's [E, in] is applied to every token


def _linear_bytes(module: nn.Module, own: int) -> float:
    if (stated := getattr(module, "weight_bytes", None)) is not None:
        return float(stated() if callable(stated) else stated)
    weight = getattr(module, "weight", None)
    if callable(weight):  # torch's dynamically quantised Linear hides its packed weight behind a method
        return float(stored_bytes(weight()))
    return float(own)


def _routing(model: PreTrainedModel, tokens: int) -> tuple[float, float]:
    """Return the share of a mixture's experts that a token uses, and the expected share that `tokens` tokens use."""
    config = text_config(model)
    top_k, experts = _first(config, _TOP_K) or 1, _first(config, _EXPERTS) or 1
    used = min(1.0, top_k / experts)
    return used, 1 - (1 - used) ** tokens


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
