"""Where a model multiplies by weights: find its linear layers and replace them.

Linear layers are `nn.Linear` and GPT-2's `Conv1D`. A tied lm_head is one, too: its replacement gets separate weights,
and the embedding keeps the table. Left alone are experts that a mixture stores as one 3-D parameter, layers with hooks
or a patched forward, and layers whose weight the model's own code reads (Mamba's `dt_proj`).
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from . import placement, seam, sharding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHT_READ = re.compile(r"\bself\.(\w+)\.(?:weight|bias)\b")
_SETUP = ("__init__", "_init_weights", "reset_parameters", "init_mamba_weights")  # run before any replacement


class Replacement(nn.Module):
    """A layer that replaces a linear layer and never changes, so that copies of a model share it.

    Its weights are often not ordinary tensors (packed, opaque, of another library's class). They are plain attributes,
    which `parameters()` and `buffers()` do not list, so their size is given as `weight_bytes`.

    Args:
        linear: the layer that it replaces.
        weight_bytes: bytes of weights, scales and bias that it holds and reads at each call.
        form: format of the weights: "bfloat16", "nf4". Layers of one class, size and form run the same code.

    Attributes:
        capturable: whether its calls can be recorded in a graph: they never wait for the device, and the operations
            they run do not depend on values.
    """

    capturable: bool = True

    def __init__(self, linear: nn.Linear, weight_bytes: int, form: str) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight_bytes = weight_bytes
        self.form = form

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def plain(self) -> nn.Linear | None:
        """An `nn.Linear` over the same memory, which may be replaced instead of this layer, or None."""
        return None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form}"


class SharedLinear(nn.Module):
    """A layer that replaces a linear layer and multiplies by the same tensors.

    Args:
        linear: the layer.
    """

    weight: torch.Tensor  # [N, K]
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        share(linear, self, ("weight", "bias"))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def share(layer: nn.Module, other: nn.Module, names: Iterable[str]) -> None:
    """Give `other` the tensors of `layer` under their names. A parameter stays a parameter; a missing one is None."""
    for name in names:
        tensor = getattr(layer, name, None)
        if isinstance(tensor, nn.Parameter):
            other.register_parameter(name, tensor)
        else:
            other.register_buffer(name, tensor)


def linears(model: nn.Module, skip: str = "") -> dict[str, nn.Linear]:
    """Linear layers that may be replaced, by dotted name.

    Args:
        model: any module tree.
        skip: layers to leave out, as in `is_named`.

    Returns:
        Name -> the layer, or for a `Conv1D` a view of it as `nn.Linear` that shares its memory.
    """
    return {name: linear for name, _, linear in _sites(model, skip)}


def is_named(name: str, parts: str) -> bool:
    """Whether a dotted name contains one of several comma-separated paths of whole names: "lm_head,layers.3.mlp"."""
    return any(f".{part.strip()}." in f".{name}." for part in parts.split(","))


def replace(model: nn.Module, exchange: Callable[[nn.Linear], nn.Module | None], skip: str = "") -> int:
    """Replace linear layers in place; `model` must be a twin.

    Args:
        model: the twin to edit. Its layers' tensors are shared with the original and are only read.
        exchange: returns the replacement of a layer, or None to keep it. Called once for a layer with two names.
        skip: as in `linears`.

    Returns:
        Number of layers that were replaced.
    """
    made: dict[int, nn.Module | None] = {}
    with torch.no_grad():
        for name, layer, linear in _sites(model, skip):
            if id(layer) not in made:
                made[id(layer)] = exchange(linear)
            if (new := made[id(layer)]) is not None:
                placement.keep_hook(layer, new)
                model.set_submodule(name, new.train(layer.training))
    return sum(new is not None for new in made.values())


def embeddings(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """The token embedding under each of its names. Empty if it does more than look rows up or if its weight is read."""
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding or table.max_norm is not None:
        return {}
    return {name: table for name, module in _candidates(model) if module is table}


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    """Count the layers of `kind` in a model."""
    return sum(isinstance(module, kind) for module in model.modules())


def stored_bytes(*models: nn.Module) -> int:
    """Bytes of memory that the models' weights take together. Shared weights count once."""
    tensors = map(sharding.local, chain.from_iterable(chain(model.parameters(), model.buffers()) for model in models))
    storages: dict[int, int] = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    replacements = {id(m): m.weight_bytes for model in models for m in model.modules() if isinstance(m, Replacement)}
    return sum(storages.values()) + sum(replacements.values())


def waiting(model: nn.Module) -> str | None:
    """Which layers prevent a model's calls from being recorded in a graph, or None."""
    forms = {str(m.form) for m in model.modules() if isinstance(m, Replacement) and not m.capturable}
    if not forms:
        return None
    return f"layers in {' and '.join(sorted(forms))} wait for the device at every call, which no graph can hold"


def obstacle(model: PreTrainedModel) -> str | None:
    """Why no layer of this model can be replaced, or None."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        return "the model was loaded already quantised"
    return placement.obstacle(model) or sharding.reason(model)


def as_linear(layer: nn.Module) -> nn.Linear | None:
    """The layer as an `nn.Linear` over the same memory, or None if it is not a linear layer."""
    if isinstance(layer, Replacement):
        return layer.plain()
    if isinstance(layer, nn.Linear):
        plain = type(layer).forward is nn.Linear.forward and type(layer.weight) in (nn.Parameter, torch.Tensor)
        return layer if plain else None
    if type(layer) is not seam.conv1d():
        return None
    conv: Any = layer
    inputs, outputs = conv.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().T, requires_grad=False)
    linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear


def _sites(model: nn.Module, skip: str) -> list[tuple[str, nn.Module, nn.Linear]]:
    """Name, layer and the layer as `nn.Linear`. A layer with two names is listed twice."""
    named = [(name, layer) for name, layer in _candidates(model) if not is_named(name, skip)]
    return [(name, layer, linear) for name, layer in named if (linear := as_linear(layer)) is not None]


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name, except modules with hooks or a patched forward and modules whose weight their
    parent reads instead of calling them."""
    for prefix, parent in model.named_modules(remove_duplicate=False):
        read = _weights_read(type(parent))  # type: ignore[arg-type]  # to mypy no class is hashable
        for attribute, layer in parent._modules.items():  # named_children() leaves out second names
            if layer is None or attribute in read:
                continue
            if not (layer._forward_hooks or layer._forward_pre_hooks or placement.is_patched(layer)):
                yield f"{prefix}.{attribute}" if prefix else attribute, layer


@functools.cache
def _weights_read(cls: type) -> frozenset[str]:
    """Attributes of a module class whose `.weight` or `.bias` its methods read instead of calling them."""
    read: set[str] = set()
    for owner in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, method in vars(owner).items():
            if not inspect.isfunction(method) or name in _SETUP:
                continue
            if not {"weight", "bias"}.isdisjoint(_names(inspect.unwrap(method).__code__)):  # finding a source takes 1 ms
                try:
                    read |= set(_WEIGHT_READ.findall(inspect.getsource(method)))
                except (OSError, TypeError):  # no source: built at run time
                    continue
    return frozenset(read)


def _names(code: types.CodeType) -> Iterator[str]:
    """The names of attributes and globals that a function and those within it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
