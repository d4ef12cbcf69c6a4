"""What may be done to a model between two calls. Each change returns what undoes it, or None where nothing can.

A change takes any of the architectures: it looks for a module of the kind that it changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module  # type: ignore[import-untyped]
from torch import nn
from torch.nn.modules import module as registry

from autotune.model import seam
from tests.fuzz.seen import COUNTED, LOG

Undo = Callable[[], Any] | None
Change = Callable[[Any], Undo]
FACTOR = 1.5  # by which numbers change


def linear(model: Any, number: int = 1) -> Any:
    """A layer that multiplies by a weight, not the head's."""
    kinds = (nn.Linear, seam.conv1d())
    found = [m for name, m in model.named_modules() if isinstance(m, kinds) and "lm_head" not in name]
    return found[number % len(found)]


def norm(model: Any) -> Any:
    return next(m for m in model.modules() if "norm" in type(m).__name__.lower())


def activation(model: Any) -> Any:
    """An activation, or whatever else has neither parameters nor children."""
    bare = [m for m in model.modules() if not list(m.children()) and not list(m.parameters()) and not list(m.buffers())]
    return next((m for m in bare if "drop" not in type(m).__name__.lower()), bare[0])


def layers(model: Any) -> Any:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


def put(holder: Any, name: str, value: Any) -> Undo:
    """Set an attribute; undone, it is as it was, or not there."""
    there, was = name in vars(holder), getattr(holder, name, None)
    setattr(holder, name, value)
    return (lambda: setattr(holder, name, was)) if there else (lambda: delattr(holder, name))


# Hooks

hook_name = {"forward": "register_forward_hook", "before": "register_forward_pre_hook"}


def noted(name: str) -> Callable[..., None]:
    return lambda *_: LOG.append(name)


def hook(where: Callable[[Any], Any], how: str = "forward", act: Any = None, **options: Any) -> Change:
    return lambda model: getattr(where(model), hook_name[how])(act or noted(f"{how} hook"), **options).remove


def doubling(module: Any, args: Any, output: Any) -> Any:
    LOG.append("doubling hook")
    return output * 2


def negating(module: Any, args: Any, output: Any) -> Any:
    LOG.append("negating hook")
    output.logits = -output.logits
    return output


def everywhere(model: Any) -> Undo:
    return registry.register_module_forward_hook(lambda m, *_: LOG.append(type(m).__name__)).remove


def dispatched(model: Any) -> Undo:
    """A hook of accelerate's, which exchanges the module's forward."""

    class Noting(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            LOG.append("accelerate hook")
            return args, kwargs

    module = linear(model)
    add_hook_to_module(module, Noting())
    return lambda: remove_hook_from_module(module)


# Forwards and classes


class Counted:
    """A user's object, one of whose methods takes a module's place. It cannot be copied."""

    def __init__(self, forward: Any) -> None:
        self.inner = forward
        self.lock = threading.Lock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            LOG.append(COUNTED)
        return self.inner(*args, **kwargs)


def counted(where: Callable[[Any], Any]) -> Change:
    return lambda model: put(where(model), "forward", Counted(where(model).forward).forward)


def patched(model: Any) -> Undo:
    module = linear(model)
    forward = module.forward
    return put(module, "forward", lambda *args: forward(*args) * FACTOR)


def patched_class(model: Any) -> Undo:
    """Of this module's class, so of every model's; `seen` is the plain model's first, and undone last."""
    cls = type(norm(model))
    forward = cls.forward
    return put(cls, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs) * FACTOR)


def exchanged(where: Callable[[Any], Any]) -> Change:
    def change(model: Any) -> Undo:
        module = where(model)
        was = type(module)
        module.__class__ = type("Louder", (was,), {"forward": lambda self, *a: was.forward(self, *a) * FACTOR})
        return lambda: setattr(module, "__class__", was)

    return change


# Attributes and configurations


def attribute(model: Any) -> Undo:
    """A number that a module holds: an epsilon, a scale."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and value != 0.0 and name != "norm_type":  # of no use without max_norm
                return put(module, name, value * 3)
    return put(norm(model), "unread", 1.0)


def configured(model: Any) -> Undo:
    """Forward returns more, unless it is told otherwise."""
    return put(model.config, "output_hidden_states", True)


def eager(model: Any) -> Undo:
    was = model.config._attn_implementation
    model.set_attn_implementation("eager")
    return lambda: model.set_attn_implementation(was)


def defaults(model: Any) -> Undo:
    """What generate does if it is not told otherwise: no plan depends on it."""
    return put(model.generation_config, "repetition_penalty", 1.3)


def trained(model: Any) -> Undo:
    model.train()
    return model.eval


def trained_part(model: Any) -> Undo:
    layers(model).train()
    return layers(model).eval


def swapped(model: Any) -> Undo:
    """The first two layers, in the other order."""
    held = layers(model)

    def swap() -> None:
        held[0], held[1] = held[1], held[0]

    swap()
    return swap


def led_back(model: Any) -> Undo:
    return put(layers(model)[0], "owner", {"model": [model], "call": model.forward})


# Tensors


def bias(model: Any) -> Undo:
    module = linear(model)
    was = module.bias
    size = module.weight.shape[1 if isinstance(module, seam.conv1d()) else 0]
    module.bias = nn.Parameter(torch.linspace(-1, 1, size, dtype=module.weight.dtype), requires_grad=False)
    return lambda: setattr(module, "bias", was)


def buffered(model: Any) -> Undo:
    module = norm(model)
    name = f"more{len(module._buffers)}"  # it may be done twice
    module.register_buffer(name, torch.ones(3))
    return lambda: delattr(module, name)


def reparametrised(model: Any) -> Undo:
    module = linear(model)
    was = module.weight
    module.weight = nn.Parameter(was.detach() * FACTOR, requires_grad=False)
    return lambda: setattr(module, "weight", was)


def replaced(model: Any) -> Undo:
    """A layer by another one with other weights."""
    held = layers(model)
    name, was = next((n, m) for n, m in held[0].named_modules() if isinstance(m, nn.Linear | seam.conv1d()))
    shape = was.weight.shape if isinstance(was, seam.conv1d()) else was.weight.shape[::-1]
    other = nn.Linear(*shape, bias=False, dtype=was.weight.dtype).requires_grad_(False)
    nn.init.constant_(other.weight, 0.01)
    held[0].set_submodule(name, other)
    return lambda: held[0].set_submodule(name, was)


@torch.no_grad()
def written(model: Any) -> Undo:
    linear(model).weight.mul_(FACTOR)
    return None


def written_data(model: Any) -> Undo:
    linear(model).weight.data.mul_(FACTOR)
    return None


def other_data(model: Any) -> Undo:
    weight = linear(model).weight
    was, weight.data = weight.data, weight.data * FACTOR
    return None if was is None else lambda: setattr(weight, "data", was)


def optimised(model: Any) -> Undo:
    weight = linear(model).weight
    wanted = weight.requires_grad
    weight.requires_grad_(True).grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    weight.requires_grad_(wanted).grad = None
    return None


def loaded(model: Any) -> Undo:
    model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()})
    return None


def converted(model: Any) -> Undo:
    model.double()
    return model.float


CHANGES: dict[str, Change] = {
    "hook": hook(lambda m: m),
    "hook on a linear": hook(linear),
    "hook before a norm": hook(norm, "before"),
    "hook that doubles": hook(linear, act=doubling),
    "hook that negates": hook(lambda m: m, act=negating),
    "hook with keywords": hook(lambda m: m, "before", act=lambda m, a, k: LOG.append(sorted(k)), with_kwargs=True),
    "hook always": hook(linear, always_call=True),
    "hook everywhere": everywhere,
    "hook of accelerate": dispatched,
    "counted forward": counted(linear),
    "counted model": counted(lambda m: m),
    "patched forward": patched,
    "patched class": patched_class,
    "class of a norm": exchanged(norm),
    "class of an activation": exchanged(activation),
    "attribute": attribute,
    "configuration": configured,
    "attention": eager,
    "defaults": defaults,
    "training": trained,
    "training of a part": trained_part,
    "order of layers": swapped,
    "leads back": led_back,
    "lock": lambda m: put(layers(m)[0], "lock", threading.Lock()),
    "bias": bias,
    "buffer": buffered,
    "parameter": reparametrised,
    "module": replaced,
    "written": written,
    "written data": written_data,
    "other data": other_data,
    "optimizer": optimised,
    "loaded": loaded,
    "double": converted,
    "gradients": lambda m: (m.requires_grad_(True), lambda: m.requires_grad_(False))[1],
}
INEXACT = {"double", "hook of accelerate"}  # undone, the model computes the same, and yet is not quite what it was
SILENT = {"defaults"}  # a plan may serve on
