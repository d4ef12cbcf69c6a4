"""All decoder layers of a short prompt as one operator, where they are called one after the other with the same inputs.

What the interpreter does between the operators of two layers takes long, because they leave nothing of it in the
processor's caches. So the first layer computes all of them, and the others hand its result on. What the layers are
called with is recorded before that is relied on, and compared in every call.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from ..errors import VariantError
from ..model import seam
from . import attention_prompt
from .fused_decoder import FUSED, LayerParts, Products, WholeStack, around, fits
from .kernels.bf16 import FEW
from .merged_blocks import random_like

MOST_TOKENS = 512  # of a forward: until the cache has stored them, keys and values of all layers lie beside it
ASKED = ("output_hidden_states", "output_attentions")  # by which a caller asks for what single layers give


class LayerInputs(NamedTuple):
    """What a decoder layer is called with besides the numbers of its tokens."""

    mask: Tensor | None
    angles: Any
    cache: Any
    others: dict[str, Any]

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> LayerInputs:
        given = dict(kwargs)
        mask, angles = given.pop("attention_mask", None), given.pop("position_embeddings", None)
        return cls(mask, angles, seam.pop_cache(given), given)

    def are(self, other: LayerInputs) -> bool:
        """Whether they are the same objects."""
        same = self.mask is other.mask and self.angles is other.angles and self.cache is other.cache
        return (
            same
            and self.others.keys() == other.others.keys()
            and all(value is other.others[name] for name, value in self.others.items())
        )


class Prepared:
    """Addresses of some layers' tensors, as the operator takes them. Modules do not change, but for hooks.

    Attributes:
        first: the parts of the first layer.
        products: how it multiplies, as all of them do.
        places: of the layers in a cache.
        table: of the addresses.
        key_features: outputs of k.
    """

    def __init__(self, layers: list[nn.Module], parts: list[LayerParts], products: list[Products]) -> None:
        self.first, self.products = parts[0], products[0]
        self.places = [part.attention.layer_idx for part in parts]
        self._layers = layers
        self._forwards = _forwards(layers)
        self._hooks = [
            hooks
            for each in [*layers, *(module for part in parts for module in part.modules)]
            for hooks in (each._forward_hooks, each._forward_pre_hooks)
        ]
        self._tensors, form, eps = _held(parts, products)
        self._places = self._addresses()
        q, k, _, _, gate, *_ = self.products.layers
        self.key_features = k.out_features
        sizes = q.in_features, self.first.attention.head_dim, q.out_features, k.out_features, gate.out_features
        self.table = torch.ops.autotune.layer_table(self._tensors, form, eps, *sizes)

    @classmethod
    def of(cls, layers: list[nn.Module], tokens: int) -> Prepared | None:
        """Prepare layers for a number of tokens; None if one operator cannot compute them all."""
        parts = [found for layer in layers if (found := _unwatched(layer)) is not None]
        if len(parts) < len(layers) or any(part.attention.config is not parts[0].attention.config for part in parts):
            return None
        products = [how for part in parts if (how := part.products(tokens)) is not None]
        if len(products) < len(parts) or not _alike(parts, products):
            return None
        return cls(layers, parts, products)

    def is_of(self, layers: list[nn.Module]) -> bool:
        """Whether these are the layers, nobody watches them, and their tensors lie where they did."""
        return (
            self._layers == layers
            and not any(self._hooks)
            and self._forwards == _forwards(layers)
            and self._places == self._addresses()
        )

    def _addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._tensors))


def _forwards(layers: list[nn.Module]) -> list[Any]:
    return [vars(layer).get("forward") for layer in layers]


_prepared = WeakKeyDictionary[nn.Module, dict[bool, Prepared]]()  # by the module that calls the layers, and FEW


class Stack(WholeStack):
    """One forward of the module that calls the layers.

    Args:
        layers: in the order in which they are called.
        constants: what each of them passes to its attention function besides tensors.
        kept: what was prepared for earlier forwards, by whether they had few tokens; it is kept up to date.
    """

    def __init__(
        self, layers: list[nn.Module], constants: dict[str, Any], kept: dict[bool, Prepared] | None = None
    ) -> None:
        self.layers = layers
        self.constants = constants
        self._kept = {} if kept is None else kept
        self._given: LayerInputs | None = None
        self._result: Tensor | None = None
        self._called = 1  # layers that were called, once the first one computed all

    def result(self, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The numbers after all layers, if the first one could compute them; None: the layer is computed by itself.

        Raises:
            VariantError: the layers were called otherwise than when they were recorded.
        """
        if self._result is None:
            if layer is self.layers[0] and self._given is None:
                self._given = LayerInputs.of(kwargs)
                self._result = self._computed(x, self._given)
            return self._result
        is_next = x is self._result and layer in self.layers[self._called : self._called + 1]
        if not is_next or self._given is None or not self._given.are(LayerInputs.of(kwargs)):
            raise VariantError("the model calls its decoder layers otherwise than it did when they were put together")
        self._called += 1
        return x

    def require_all_called(self) -> None:
        """Raise VariantError if layers were computed that the model did not call."""
        if self._result is not None and self._called < len(self.layers):
            raise VariantError(f"the model called {self._called} of its {len(self.layers)} decoder layers")

    def _computed(self, x: Tensor, given: LayerInputs) -> Tensor | None:
        tokens, cache = x.shape[0] * x.shape[1], given.cache
        if not 1 < tokens <= MOST_TOKENS or modules._has_any_global_hook():  # type: ignore[no-untyped-call]
            return None
        prepared = self._prepare(tokens)
        if prepared is None or not fits(prepared.first, x, given.angles):
            return None
        first, products = prepared.first.attention, prepared.products
        precision = attention_prompt.PARTS_BY_NAME.get(seam.attention_of(first.config))
        if precision is None or (cache is not None and not seam.is_unfilled(cache, prepared.places)):
            return None
        queries, depth = x.shape[1], first.head_dim
        seen = attention_prompt.seen_by(first, queries, queries, depth, given.mask, {**self.constants, **given.others})
        if seen is None:
            return None
        settings = *seen, precision, prepared.first.mlp.activation, products.number
        sizes = len(self.layers), prepared.key_features
        y, keys, values = products.all(x, prepared.table, *sizes, *given.angles, *settings)
        if cache is not None:
            for place, *states in zip(prepared.places, keys.unbind(), values.unbind(), strict=True):
                cache.update(*states, place)
        result: Tensor = y
        return result

    def _prepare(self, tokens: int) -> Prepared | None:
        few = tokens < FEW
        if (kept := self._kept.get(few)) is not None and kept.is_of(self.layers):
            return kept
        if (found := Prepared.of(self.layers, tokens)) is None:
            self._kept.pop(few, None)
        else:
            self._kept[few] = found
        return found


def _unwatched(layer: nn.Module) -> LayerParts | None:
    """A layer's modules if nobody watches its calls and it computes what it did, else None."""
    if layer._forward_hooks or layer._forward_pre_hooks or not hasattr(layer.__dict__.get("forward"), FUSED):
        return None
    return LayerParts.of(layer)


def _alike(parts: list[LayerParts], products: list[Products]) -> bool:
    """Whether one operator computes all layers: they multiply and bend alike, and have the same sizes."""
    mine, first = products[0], parts[0]
    sizes = [m.out_features for m in mine.layers]
    norms = (norm.weight for part in parts for norm in part.norms)
    return all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in norms) and all(
        other.all is mine.all
        and other.number == mine.number
        and [m.out_features for m in other.layers] == sizes
        and part.mlp.activation == first.mlp.activation
        and part.attention.head_dim == first.attention.head_dim
        and type(part.attention) is type(first.attention)
        for part, other in zip(parts, products, strict=True)
    )


def _held(parts: list[LayerParts], products: list[Products]) -> tuple[list[Tensor], Tensor, Tensor]:
    """The layers' tensors, which of them there are, and the norms' epsilons, as the operator `layers` reads them."""
    held, form, eps = list[Tensor](), list[list[int]](), list[list[float]]()
    for part, how in zip(parts, products, strict=True):
        of_heads = [] if part.q_norm is None else [part.q_norm, part.k_norm]
        held += [norm.weight for norm in (part.before, part.after, *of_heads)]
        row = [int(bool(of_heads))]
        for layer in how.layers:
            stored, bias = layer.stored, layer.bias
            held += stored if bias is None else [*stored, bias]
            row += [len(stored), int(bias is not None)]
        form.append(row)
        eps.append([part.before.eps, of_heads[0].eps if of_heads else 0.0, part.after.eps])
    small = torch.tensor(eps, dtype=torch.float32, device="cpu")
    return held, torch.tensor(form, dtype=torch.int64, device="cpu"), small


def stacked_forward(owner: nn.Module) -> types.FunctionType | None:
    """A forward for a module that calls fused layers one after the other with the same inputs; None for any other."""
    if "forward" in vars(owner):
        return None
    lists = [(name, child) for name, child in owner.named_children() if isinstance(child, nn.ModuleList) and len(child)]
    if len(lists) != 1:
        return None
    ((name, layers),) = lists
    forwards = [layer.__dict__.get("forward") for layer in layers]
    constants = [getattr(forward, FUSED, None) for forward in forwards]
    if constants[0] is None or any(each != constants[0] for each in constants) or not _in_turn(owner, list(layers)):
        return None
    return _forward(type(owner).forward, name, constants[0])


def _forward(own: Callable[..., Any], name: str, constants: dict[str, Any]) -> types.FunctionType:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(asked) or getattr(self.config, asked, False) for asked in ASKED):
            return own(self, *args, **kwargs)
        stack = Stack(list(getattr(self, name)), constants, _prepared.setdefault(self, {}))
        with _calling(stack):
            found = own(self, *args, **kwargs)
        stack.require_all_called()
        return found

    return forward  # type: ignore[return-value]


@contextmanager
def _calling(stack: WholeStack) -> Iterator[None]:
    token = around.set(stack)
    try:
        yield
    finally:
        around.reset(token)


class _Recorded(WholeStack):
    """Notes what layers are called with, and answers in their place."""

    def __init__(self) -> None:
        self.calls = list[tuple[nn.Module, Tensor, LayerInputs]]()
        self.answers = list[Tensor]()

    def result(self, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        self.calls.append((layer, x, LayerInputs.of(kwargs)))
        self.answers.append(x.clone())
        return self.answers[-1]


@torch.no_grad()
def _in_turn(owner: Any, layers: list[nn.Module]) -> bool:
    """Whether a module calls its layers in turn, each with the result of the last, and all with the same inputs."""
    seen = _Recorded()
    first: Any = layers[0]
    weight = first.input_layernorm.weight
    given: dict[str, Any] = {"inputs_embeds": random_like(weight, 1, 3, weight.numel())}
    name = seam.cache_argument(seam.forward_function(owner))
    given |= {} if name is None else {name: seam.growing_cache(), "use_cache": True}
    try:
        with _calling(seen):
            owner(**given)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # it does not take the inputs of a decoder
    if [layer for layer, _, _ in seen.calls] != layers:
        return False
    inputs = [each for _, _, each in seen.calls]
    chained = all(x is before for (_, x, _), before in zip(seen.calls[1:], seen.answers, strict=False))
    return chained and all(each.are(inputs[0]) for each in inputs)
