"""Structural copies of a model: modules of its own, and everything else shared with the model it was made from.

    modules                       copied, and with them their dictionaries, lists, tuples and sets
    configurations                copied: which attention is used stands there
    methods, partials             of a copied module belong to its copy
    compiled calls                left out: they are the copied module's
    parameters, buffers, tensors  shared, and so are all other objects: what cannot be copied, too
    modules that are run for      shared: what they write by themselves is state of the calls (stateful.py)
      what they remember

Copying goes by identity, so that ties stay ties and a model that is reached from its own attributes leads to the copy.
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


_shared: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # of all models

COMPILED = frozenset({"_compiled_call_impl", "_is_torch_compile"})  # what torch.compile leaves on a module


def share(modules: Iterable[nn.Module]) -> None:
    """From now on twins share these modules with their originals."""
    _shared.update(modules)


def is_shared(module: nn.Module) -> bool:
    """Whether twins share a module with their original."""
    return module in _shared


def shared(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, of those that a model shares with its twins."""
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
    """Copies by the identity of what is copied.

    Attributes:
        known: id of an object -> its copy; the objects are held by the model meanwhile.
    """

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def fill(self, twin: nn.Module, module: nn.Module) -> None:
        held = {key: value for key, value in vars(module).items() if key not in COMPILED}
        twin.__dict__.update({key: self.copy(value) for key, value in held.items()})

    def copy(self, value: Any) -> Any:
        if id(value) in self.known:
            return self.known[id(value)]
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, seam.configurations()):
            return self.keep(value, copy.deepcopy(value))
        kind = type(value)
        if kind in (dict, OrderedDict):
            new: Any = self.keep(value, kind())
            new.update((key, self.copy(each)) for key, each in value.items())
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
        return value

    def keep(self, value: Any, made: Any) -> Any:
        self.known[id(value)] = made
        return made

    def module(self, module: nn.Module) -> Any:
        cls = type(module)
        if isinstance(module, torch.jit.ScriptModule) or is_shared(module):
            return module
        if cls.__new__ is not object.__new__ or hasattr(cls, "__deepcopy__"):  # a class of its own for each object
            return copy.deepcopy(module, self.known)
        twin = self.keep(module, cls.__new__(cls))
        self.fill(twin, module)
        return twin

    def partial(self, value: Any) -> Any:
        """With what `functools.update_wrapper` left on it."""
        new = functools.partial(self.copy(value.func), *map(self.copy, value.args), **self.copy(value.keywords))
        new.__dict__.update(self.copy(vars(value)))
        return self.keep(value, new)
