"""Interception: route the `forward` and the decoding loop of one model object, and change nothing else about it.

The object keeps its identity. Only its class is replaced, by a subclass of the same name that asks a `Router`.
Experiments on live calls are layers above the router; they can be added and removed in any order.
`generate` stays transformers' own: all its preparation, validation and exceptions happen before the loop is routed.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch

from . import modes, seam
from .seam import Sampling, bare_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLOT = "autotune"  # the instance attribute that holds the router
LAYERS = "_autotune_layers"  # the instance attribute that holds the routers above it, outermost last
_ORIGINS: weakref.WeakKeyDictionary[PreTrainedModel, Callable[[], PreTrainedModel | None]] = (
    weakref.WeakKeyDictionary()
)  # alias -> the model that it is an alias of
_ROUTED: dict[type, type[PreTrainedModel]] = {}  # model class -> its routed subclass


class Router(Protocol):
    """Decides which variant serves a call."""

    def sample(self, call: Sampling) -> Any: ...

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def other_loop(self, name: str) -> AbstractContextManager[object]: ...


def attach(model: PreTrainedModel, router: Router) -> None:
    """Route this object's calls through `router`."""
    model.__dict__[SLOT] = router
    model.__class__ = routed_class(bare_class(model))


def hold(model: PreTrainedModel, router: Router) -> None:
    """Store `router` on this object without routing its calls through it."""
    model.__dict__[SLOT] = router


def detach(model: PreTrainedModel) -> None:
    """Undo `attach` completely; layers stay."""
    model.__dict__.pop(SLOT, None)
    _settle(model)


def add_layer(model: PreTrainedModel, layer: Router) -> None:
    """Route this object's calls through `layer` first. It passes calls that it does not serve on to `below`."""
    model.__dict__[LAYERS] = (*model.__dict__.get(LAYERS, ()), layer)
    model.__class__ = routed_class(bare_class(model))


def remove_layer(model: PreTrainedModel, layer: Router) -> None:
    """Remove this layer. The router and all other layers stay in place."""
    model.__dict__[LAYERS] = tuple(other for other in model.__dict__.get(LAYERS, ()) if other is not layer)
    _settle(model)


def has_layers(model: PreTrainedModel) -> bool:
    """Whether something routes this object's calls before the router, as an experiment does."""
    return bool(model.__dict__.get(LAYERS))


def below(model: PreTrainedModel, layer: Router | None = None) -> Router:
    """Who serves the calls that `layer` passes on: the next layer, the router or the plain model.

    Args:
        layer: the layer that passes a call on; None: the call has just come in and goes to the outermost layer.
    """
    layers = model.__dict__.get(LAYERS, ())
    inner = [n for n, other in enumerate(layers) if other is layer]
    under = layers[: inner[0]] if inner else layers if layer is None else ()
    found: Router = under[-1] if under else model.__dict__.get(SLOT, _PLAIN)
    return found


def _settle(model: PreTrainedModel) -> None:
    if not has_layers(model):
        model.__dict__.pop(LAYERS, None)
        if SLOT not in model.__dict__:
            model.__class__ = bare_class(model)


class Plain:
    """Router for a model that has none: calls the model itself. Other routers override what they serve differently."""

    def sample(self, call: Sampling) -> Any:
        return call.original()

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return bare_class(model).forward(model, *args, **kwargs)

    def other_loop(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()


_PLAIN = Plain()


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, unrouted: another object of the original class over the same modules and tensors."""
    return _alias(model, bare_class(model))


def routed(model: PreTrainedModel, router: Router) -> PreTrainedModel:
    """The same model, routed through `router`. The given object does not change."""
    alias = _alias(model, routed_class(bare_class(model)))
    alias.__dict__[SLOT] = router
    return alias


def greedy(model: PreTrainedModel, pad_token_id: int, eos_token_ids: Sequence[int] = ()) -> PreTrainedModel:
    """The same model with the same routing, and plain greedy decoding by default. The given object does not change.

    Measurements and quality checks generate with this, so that a checkpoint's own defaults do not affect them.

    Args:
        pad_token_id: for left padding, and after the end of a sequence.
        eos_token_ids: tokens that end a text; none where tokens are forced or counted.
    """
    alias = _alias(model, type(model))
    alias.__dict__.update({name: model.__dict__[name] for name in (SLOT, LAYERS) if name in model.__dict__})
    alias.generation_config = seam.greedy_settings(pad_token_id, list(eos_token_ids) or None)
    return alias


@contextmanager
def _bare_for_a_call(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    alias = bare(model)
    try:
        yield alias
    finally:
        seam.keep_compiled(alias, model)


def is_routed(model: object) -> bool:
    held = getattr(model, "__dict__", {})
    return (SLOT in held or LAYERS in held) and hasattr(type(model), seam.BARE)


def origin(model: PreTrainedModel) -> PreTrainedModel:
    """The object that `bare`, `routed` or `greedy` was given; any other model is its own origin."""
    return _ORIGINS.get(model, lambda: None)() or model


def _alias(model: PreTrainedModel, cls: type[PreTrainedModel]) -> PreTrainedModel:
    alias = cls.__new__(cls)
    alias.__dict__.update(model.__dict__)
    for name in (SLOT, LAYERS):
        alias.__dict__.pop(name, None)
    _ORIGINS[alias] = weakref.ref(origin(model))
    return alias


def routed_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of `cls` with the same name, whose calls go to the instance's router."""
    if cls not in _ROUTED:
        _ROUTED[cls] = _make_routed(cls)
    return _ROUTED[cls]


def own_forwards(cls: type) -> tuple[Any, ...]:
    """The forward functions of a class and of its routed subclass, if it has one."""
    return tuple(each.forward for each in (cls, _ROUTED.get(cls)) if each is not None)  # type: ignore[attr-defined]


def _make_routed(cls: Any) -> type[PreTrainedModel]:

    @functools.wraps(cls.forward)  # generate inspects the signature
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if modes.tracing():
            return cls.forward(self, *args, **kwargs)
        return below(self).forward(self, args, kwargs)

    @functools.wraps(getattr(cls, seam.LOOP))
    def sample(self: PreTrainedModel, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _bare_for_a_call(self) as model:
            return below(self).sample(
                Sampling.of(model, input_ids, dict(zip(seam.OPTIONS, args, strict=False)) | kwargs)
            )

    def __reduce_ex__(self: PreTrainedModel, protocol: Any) -> Any:
        """Copies and pickles are plain models, which need nothing of this package."""
        state = {k: v for k, v in self.__dict__.items() if k not in (SLOT, LAYERS)}
        return copyreg._reconstructor, (cls, object, None), state  # type: ignore[attr-defined]

    body: dict[str, Any] = {
        "forward": forward,
        seam.LOOP: sample,
        "__reduce_ex__": __reduce_ex__,
        seam.BARE: cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    body |= seam.marking(cls)
    body |= {name: _unrouted(cls, name) for name in seam.other_loops(cls)}
    return type(cls.__name__, (cls,), body)


def _unrouted(cls: type[PreTrainedModel], name: str) -> Callable[..., Any]:
    """Make a decoding loop that no plan serves (beam search, assisted decoding, ...): counted, run on the original."""
    loop = getattr(cls, name)

    @functools.wraps(loop)
    def run(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with below(self).other_loop(name), _bare_for_a_call(self) as model:
            return loop(model, *args, **kwargs)

    return run
