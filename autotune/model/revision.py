"""Detect whether a model changed since it was tuned, cheaply enough for every call.

A revision is the module tree at one moment: every module's class and attributes, the contents of the plain containers
and objects that they hold (configurations, an adapter's scales), the tensors, the addresses of their data, how often
they were written to, and one number of each. All of it is compared with the present state. So it does not matter who
changed what or how, and a model that was changed back counts as unchanged. Any hook counts as a change, because no plan
promises to call hooks.

A check takes 0.3 ms for the 397 modules of a Llama with 30 layers (`python -m benchmarks.revision`). It does not detect
changes outside of a forward's module (functions and constants of Python modules, closures). PyTorch does not count
writes through `tensor.data`: such a write is detected only if it changes the one number that is compared.
`look_closer` compares 64 numbers of each tensor.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as registry

from . import route, seam, stateful, twins
from .configured import TRANSIENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GLOBAL_HOOKS = (registry._global_forward_hooks, registry._global_forward_pre_hooks)
OWN = {route.SLOT, route.LAYERS, *seam.SET_AT_WILL, *twins.COMPILED}  # attributes that do not affect what is computed
UNREAD = {*vars(nn.Module()), *OWN, "_hf_hook"}  # attributes whose contents are not read: compared elsewhere, or whole
DEPTH = 3  # levels of containers and objects that are read, starting at a module's attributes
OPAQUE = (  # types that are compared as a whole; their contents are not read
    *(nn.Module, torch.Tensor, torch.dtype, torch.device, type, types.ModuleType),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType),
)
SAMPLED = 64  # numbers of a tensor that `look_closer` compares; the largest of them is compared at every call
UNCOUNTED = "a tensor was written to in a way that leaves no mark"

REGION = "autotune_region_of"  # attribute of a forward that stands in for a while for the one that it holds

_version = attrgetter("_version")


def _forward(kind: type[nn.Module]) -> Any:
    return getattr(kind.forward, REGION, kind.forward)


class Revision:
    """A model's state at the time when the revision is made.

    Args:
        model: routed or not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import PreTrainedModel  # a part of a model may be one, too

        self._model = model
        self._class = seam.bare_class(model)
        named, state = dict(model.named_modules()), stateful.of(model)
        self._parts = [module for name, module in named.items() if name]
        self._types = list(map(type, self._parts))
        self._classes = list({self._class, *self._types})
        self._forwards = list(map(_forward, self._classes))
        self._hooks = [hooks for module in named.values() for hooks in _hooks(module)]
        watched: dict[int, tuple[str, Any]] = {}
        for name, module in named.items():
            own = {key for where, key in state.written if where == name}
            own |= OWN if isinstance(module, PreTrainedModel) else set()
            for held, written in _held(name, module):
                left_out = own | written
                view = _Without(held, left_out) if left_out and isinstance(held, dict) else held
                watched.setdefault(id(held), (name, view))
        self._names = [name for name, _ in watched.values()]
        self._live = [held for _, held in watched.values()]
        self._was: list[Any] = [held.copy() for held in self._live]
        self._own = self._attributes()
        all_tensors = chain(model.named_parameters(), model.named_buffers())
        tensors = {name: t for name, t in all_tensors if not state.writes(*_parted(name))}
        counted = {name: tensor for name, tensor in tensors.items() if not tensor.is_inference()}
        self._counted = list(counted.values())
        self._counted_names = list(counted)
        self._tensors = list(tensors.values())
        self._tensor_names = list(tensors)
        self._versions, self._places = self._marks()
        self._samples = [_spread(tensor) for tensor in self._tensors if _readable(tensor)]
        self._numbers = [sample.clone() for sample in self._samples]
        self._probes = _probes(self._samples)
        self._probed = [torch.cat(probes) for probes in self._probes]
        self._found: str | None = None

    def changed(self) -> str | None:
        """What changed, or None. A hook counts as a change, even if it was there before."""
        if (any(GLOBAL_HOOKS) or any(self._hooks)) and (where := hooked(self._model)) is not None:
            return f"there is a forward hook on {where}"
        return self.differs()

    def differs(self) -> str | None:
        """What changed, except hooks, or None."""
        if self._found is not None:
            return self._found
        try:
            if not (self._live == self._was and self._attributes() == self._own):
                if (difference := self._difference()) is not None:
                    return difference
                self._was = [held.copy() for held in self._live]
            if not self._same_classes():
                return "a class or its forward was replaced"
            versions, places = self._marks()
            if versions != self._versions or places != self._places:
                return self._written(versions, places)
            probed = [torch.cat(probes) for probes in self._probes]
            return None if all(map(torch.equal, probed, self._probed)) else UNCOUNTED
        except Exception as error:  # a value that cannot be compared with the old one is a change
            return self._difference() or f"it could not be compared: {type(error).__name__}: {error}"

    def look_closer(self) -> str | None:
        """Like `changed`, but compare more numbers. A change found here is reported by all later checks."""
        for sample, numbers in zip(self._samples, self._numbers, strict=True):
            if not torch.allclose(sample, numbers, rtol=0.0, atol=0.0, equal_nan=True):
                self._found = UNCOUNTED
        return self.changed()

    def _marks(self) -> tuple[list[int], list[int]]:
        return list(map(_version, self._counted)), list(map(torch.Tensor.data_ptr, self._tensors))

    def _attributes(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self._model).items() if key not in OWN}

    def _same_classes(self) -> bool:
        return (
            list(map(type, self._parts)) == self._types
            and seam.bare_class(self._model) is self._class
            and list(map(_forward, self._classes)) == self._forwards
        )

    # In words

    def _difference(self) -> str | None:
        if self._model.training:
            return "it is in training mode"
        pairs = zip([*self._names, ""], [*self._live, self._attributes()], [*self._was, self._own], strict=True)
        return next((said for each in pairs if (said := _described(*each))), None)

    def _written(self, versions: list[int], places: list[int]) -> str:
        marks = chain(
            zip(self._counted_names, self._versions, versions, strict=True),
            zip(self._tensor_names, self._places, places, strict=True),
        )
        name = next(name for name, before, now in marks if before != now)
        return f"tensor {name} was written to or converted"


def hooked(model: nn.Module) -> str | None:
    """Where there is a forward hook, except transformers' own hooks, or None."""
    if any(GLOBAL_HOOKS):
        return "every module"
    for name, module in model.named_modules():
        if not all(seam.is_own_hook(hook) for hooks in _hooks(module) for hook in hooks.values()):
            return name or "the model"
    return None


def _hooks(module: nn.Module) -> tuple[Any, Any]:
    return module._forward_hooks, module._forward_pre_hooks


def _held(name: str, module: nn.Module) -> Iterator[tuple[Any, frozenset[str]]]:
    """The containers that determine what a module computes, and the keys of each that do not.

    The model's own attributes are compared separately.
    """
    for held in (*([vars(module)] if name else []), module._parameters, module._buffers, module._modules):
        yield held, frozenset()
    for key, value in vars(module).items():
        if key not in UNREAD:
            yield from _inside(value, DEPTH)


class _Without:
    """A live view of a dictionary without the keys that the module's forward, or saving the model, writes."""

    def __init__(self, held: dict[str, Any], own: set[str]) -> None:
        self._held = held
        self._own = own

    def copy(self) -> dict[str, Any]:
        return {key: value for key, value in self._held.items() if key not in self._own}

    def __eq__(self, other: object) -> bool:
        return self.copy() == other

    __hash__ = None  # type: ignore[assignment]


def _parted(name: str) -> tuple[str, str]:
    module, _, attribute = name.rpartition(".")
    return module, attribute


def _inside(value: Any, depth: int) -> Iterator[tuple[Any, frozenset[str]]]:
    if depth == 0 or isinstance(value, OPAQUE):
        return
    written = frozenset[str]()
    if not isinstance(value, dict | list | set):
        if not hasattr(value, "__dict__"):
            return
        if isinstance(value, seam.configurations()):
            written = TRANSIENT  # `save_pretrained` writes some of them
        value = vars(value)
    yield value, written
    for each in value.values() if isinstance(value, dict) else value:
        yield from _inside(each, depth - 1)


def _described(name: str, now: Any, was: Any) -> str | None:
    """Describe what differs in a container, or return None."""
    held = now._held if isinstance(now, _Without) else now
    now = now.copy() if isinstance(now, _Without) else now
    if not isinstance(now, dict):
        return None if now == was else f"a list or set of {name or 'the model'} changed"
    for key in (*was, *(key for key in now if key not in was)):
        if key in OWN:
            continue
        before, after = was.get(key), now.get(key)
        if before is after or (key == "forward" and _is_own(before, held) and _is_own(after, held)):
            continue
        for kind, word in ((torch.Tensor, "tensor"), (nn.Module, "module")):
            if isinstance(before, kind) or isinstance(after, kind):
                return f"{word} {key} of {name or 'the model'} was replaced"
        try:
            same = bool(before == after)
        except Exception:
            same = False
        if not same or (key in was) != (key in now):
            return f"attribute {key} of {name or 'the model'} changed"
    return None


def _is_own(forward: Any, held: Any) -> bool:
    """Whether a module's forward is its class's. It may have been replaced for a while and put back on the object."""
    owner = getattr(forward, "__self__", None)
    if forward is None or getattr(owner, "__dict__", None) is not held:
        return forward is None
    return getattr(forward, "__func__", None) in route.own_forwards(type(owner))


def _readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers can be read in place. On a GPU they cannot: reading would wait for it."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.is_cpu and tensor.is_contiguous() and tensor.numel() > 0


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """A view of evenly spaced numbers [up to SAMPLED] of a tensor."""
    flat = tensor.detach().view(-1)
    return flat[:: -(-flat.numel() // SAMPLED)]


def _probes(samples: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Views of the largest finite number [1] of each sample, by dtype. A zero would stay zero under many changes."""
    probes: dict[torch.dtype, list[torch.Tensor]] = {}
    for sample in samples:
        size = sample.to(torch.float32).nan_to_num(0.0, 0.0, 0.0).abs()
        at = int(size.argmax())
        if not bool(torch.isnan(sample[at])):
            probes.setdefault(sample.dtype, []).append(sample[at : at + 1])
    return list(probes.values())
