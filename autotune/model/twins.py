"""Structural copies of a model: the modules are copied, everything else is shared with the original model.

    modules                       copied, together with their dictionaries, lists, tuples and sets
    configurations                copied, because they name the attention implementation
    methods, partials             of a copied module: bound to its copy
    forwards of sharded modules   over the copy and its former forward
    compiled calls                left out: they belong to the original module
    parameters, buffers, tensors  shared, like all other objects, including those that cannot be copied
    modules that keep state       shared: what they write when they run is state of the calls (stateful.py)

Each object is copied once, by identity: ties stay ties, and a reference to the model itself becomes one to the copy.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import route, seam

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_shared: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules, of all models, that twins share

PLAIN = frozenset({bool, int, float, str, type(None)})  # types that cannot be changed
COMPILED = frozenset({"_compiled_call_impl", "_is_torch_compile"})  # attributes that torch.compile sets on a module


def _is_of_one(value: Any, key: str) -> bool:
    """Whether an attribute is a forward that runs one module whoever calls it, as a compiled one may."""
    return key == "forward" and bool(getattr(value, "is_of_one_module", False))


def share(modules: Iterable[nn.Module]) -> None:
    """Make twins share these modules with their originals from now on."""
    _shared.update(modules)


def is_shared(module: nn.Module) -> bool:
    """Whether twins share a module with their original."""
    return module in _shared


def shared(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that a model shares with its twins, by name."""
    return {name: module for name, module in model.named_modules() if module in _shared}


def fork(model: PreTrainedModel) -> PreTrainedModel:
    """A structural copy of an unrouted model that shares every parameter and buffer (ties stay ties)."""
    copier = _Copier()
    twin = type(model).__new__(type(model))
    for root in (model, route.origin(model)):
        copier.known[id(root)] = twin
    copier.fill(twin, model)
    return seam.uncompiled(twin)


class _Copier:
    """Copies every object once, by identity.

    Attributes:
        known: id of an object -> its copy. The model keeps the objects alive meanwhile, so ids stay valid.
    """

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}
        self._configurations = seam.configurations()

    def fill(self, twin: nn.Module, module: nn.Module) -> None:
        held = {key: value for key, value in vars(module).items() if key not in COMPILED and not _is_of_one(value, key)}
        twin.__dict__.update({key: self.copy(value) for key, value in held.items()})

    def copy(self, value: Any) -> Any:
        if type(value) in PLAIN:  # most attributes of modules
            return value
        if id(value) in self.known:
            return self.known[id(value)]
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, self._configurations):
            return self.keep(value, copy.deepcopy(value))
        kind = type(value)
        if kind in (dict, OrderedDict):
            new: Any = self.keep(value, kind())
            for key, each in value.items():  # mostly none: a module has a dictionary for each kind of hook
                new[key] = self.copy(each)
            return new
        if kind is list:
            new = self.keep(value, [])
            new.extend(map(self.copy, value))
            return new
        if kind is tuple:
            return tuple(map(self.copy, value))
        if kind is set:
            return self.keep(value, set(value))
        if kind is types.MethodType and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if kind is functools.partial:
            return self.partial(value)
        if seam.is_sharding(value):
            return self.keep(value, seam.resharding(value, self.copy))
        return value

    def keep(self, value: Any, made: Any) -> Any:
        self.known[id(value)] = made
        return made

    def module(self, module: nn.Module) -> Any:
        cls = type(module)
        if isinstance(module, torch.jit.ScriptModule) or is_shared(module):
            return module
        if cls.__new__ is not object.__new__ or hasattr(cls, "__deepcopy__"):  # each object may have its own class
            return copy.deepcopy(module, self.known)
        twin = self.keep(module, cls.__new__(cls))
        self.fill(twin, module)
        return twin

    def partial(self, value: Any) -> Any:
        """Copy a partial, with the attributes that `functools.update_wrapper` set on it."""
        new = functools.partial(self.copy(value.func), *map(self.copy, value.args), **self.copy(value.keywords))
        new.__dict__.update(self.copy(vars(value)))
        return self.keep(value, new)
