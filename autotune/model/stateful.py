"""Modules that change themselves when they run, for example rotary embeddings with frequencies that depend on length.

What such a module writes is state of the calls, not of the model. To find these modules, a twin with separate buffers
runs two tokens. Modules without weights that receive the tokens' positions are also called with other positions: far
away, then near again. What they wrote meanwhile is the state.

    twins      share these modules with the original, so that every call finds what the call before wrote
    measuring  restores their state (`State.kept`), so that it does not affect live requests
    revisions  do not compare their state; a user's change of it affects twins as it affects the original
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..machine import outside
from . import route, seam, sharding, twins

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("autotune")

FAR = 1 << 24  # a position beyond every context
NEAR = 0
PLUMBING = frozenset(vars(nn.Module()))  # attributes that every nn.Module has
_states: weakref.WeakKeyDictionary[PreTrainedModel, ForwardState] = weakref.WeakKeyDictionary()
Marks = dict[str, tuple[Any, int]]  # attribute -> its value, and how often that was written to


@dataclass(frozen=True)
class ForwardState:
    """The parts of a model that its own forward writes.

    Args:
        modules: name -> module that twins share.
        written: (name of the module, attribute), of these modules and of others.
        alien: written attributes of modules with weights or submodules. Twins would have copies of them.
    """

    modules: dict[str, nn.Module]
    written: frozenset[tuple[str, str]]
    alien: tuple[str, ...] = ()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """On exit, restore the state that the shared modules had on entry."""
        saved = [(module, dict(vars(module)), dict(module._buffers)) for module in self.modules.values()]
        numbers = [(t, t._version, t.clone()) for _, own, buffers in saved for t in _tensors(own, buffers)]
        try:
            yield
        finally:
            for tensor, version, before in numbers:
                if tensor._version != version:
                    with torch.no_grad():
                        tensor.copy_(before)
            for module, own, buffers in saved:
                _put_back(vars(module), own)
                _put_back(module._buffers, buffers)

    def writes(self, module: str, attribute: str) -> bool:
        return (module, attribute) in self.written

    def obstacle(self) -> str | None:
        """Why no plan can serve the model, or None."""
        return (
            f"the model's forward writes {', '.join(self.alien)}, which copies of the model do not share"
            if self.alien
            else None
        )

    def unseen(self, by: str) -> str | None:
        """Why something that reads the model's tensors only once cannot serve the model, or None.

        Args:
            by: what reads them, as the subject of the sentence.
        """
        if not self.modules:
            return None
        return f"{', '.join(self.modules)} computes its buffers anew as contexts grow, which {by} would not see"


NOTHING = ForwardState({}, frozenset())


def of(model: PreTrainedModel) -> ForwardState:
    """The state of a model, routed or not. It is determined at the first request."""
    root = route.origin(model)
    if root not in _states:
        known = twins.shared(root)
        _states[root] = ForwardState(known, frozenset()) if known else _find(root)  # a twin's state: what it shares
        twins.share(_states[root].modules.values())
    return _states[root]


def forget(model: PreTrainedModel) -> None:
    """Forget a model's state, because the model may have changed. `of` will determine it again."""
    _states.pop(route.origin(model), None)


def _find(model: PreTrainedModel) -> ForwardState:
    try:
        with torch.no_grad():
            return _probe(model)
    except Exception as error:  # a model that cannot run two tokens fails with its own message when it is tuned
        outside.pass_on(error)
        log.debug("what a forward writes was not found out", exc_info=True)
        return NOTHING


def _probe(model: PreTrainedModel) -> ForwardState:
    twin = twins.fork(model)
    named = {name: module for name, module in twin.named_modules() if name and not twins.is_shared(module)}
    for module in named.values():
        _own_tensors(module)
    before = {name: _marks(module) for name, module in named.items()}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    light = {name: module for name, module in named.items() if _is_light(module)}
    hooks = [module.register_forward_pre_hook(_noting(calls, name), with_kwargs=True) for name, module in light.items()]
    ids = torch.tensor([[1, 2]], dtype=torch.int64, device=model.device)
    with sharding.alone(model):
        seam.bare_class(twin).forward(twin, input_ids=ids)
    for hook in hooks:
        hook.remove()
    written = {name: _changed(before[name], _marks(module)) for name, module in named.items()}
    for name, given in calls.items():
        written[name] |= _written_elsewhere(light[name], *given)
    names = frozenset((name, attribute) for name, attributes in written.items() for attribute in attributes)
    ours = dict(model.named_modules())
    modules = {name: ours[name] for name in light if written[name]}
    return ForwardState(modules, names, tuple(f"{name}.{key}" for name, key in sorted(names) if name not in modules))


def _is_light(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None and next(module.children(), None) is None


def _own_tensors(module: nn.Module) -> None:
    """Copy all tensors of a twin's module that are not weights, so that it does not share them."""
    for held in (vars(module), module._buffers):
        for key, value in held.items():
            if type(value) is torch.Tensor or type(value) is nn.Buffer:
                held[key] = value.clone()


def _noting(calls: dict[str, Any], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, (args, kwargs))

    return note


def _written_elsewhere(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Attributes that a module without weights writes when it is given other positions.

    It runs on the CPU, where an index beyond a table only raises an exception.
    """
    if not any(map(_is_positions, (*args, *kwargs.values()))):
        return set()
    copied = copy.deepcopy(module).cpu()
    before, found = _marks(copied), set[str]()
    for position in (FAR, NEAR):
        moved = [_moved(value, position) for value in args], {k: _moved(v, position) for k, v in kwargs.items()}
        try:
            copied(*moved[0], **moved[1])
        except Exception as error:  # the position is beyond its table
            outside.pass_on(error)
        found |= _changed(before, _marks(copied))
    return found


def _is_positions(value: Any) -> bool:
    """Whether a value holds the positions of the probe's two tokens."""
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or not value.numel():
        return False
    return value.shape[-1] == 2 and value.flatten()[-2:].tolist() == [0, 1]


def _moved(value: Any, position: int) -> Any:
    if _is_positions(value):
        return (value + position).cpu()
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _marks(module: nn.Module) -> Marks:
    held = {key: value for key, value in vars(module).items() if key not in PLUMBING}
    return {key: (value, _version(value)) for key, value in (held | module._buffers | module._parameters).items()}


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def _changed(before: Marks, after: Marks) -> set[str]:
    return {
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or not _same(before[key], after[key])
    }


def _same(one: tuple[Any, int], other: tuple[Any, int]) -> bool:
    if one[0] is other[0]:
        return one[1] == other[1]
    if isinstance(one[0], torch.Tensor) or isinstance(other[0], torch.Tensor):
        return False
    return bool(one[0] == other[0])


def _tensors(*held: dict[str, Any]) -> Iterator[torch.Tensor]:
    for values in held:
        yield from (v for v in values.values() if isinstance(v, torch.Tensor) and not v.is_inference())


def _put_back(held: dict[str, Any], before: dict[str, Any]) -> None:
    for key in held.keys() - before.keys():
        del held[key]
    for key, value in before.items():
        if held.get(key) is not value:
            held[key] = value
