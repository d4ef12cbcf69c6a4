"""Where a model's weights are stored, and what can be tuned there.

one device              everything
several GPUs            changes of single layers (weights, attention) and the lean loop; accelerate's hooks stay
offloaded to CPU, disk  nothing: every token waits for the bus
sharded over ranks      by transformers' tensor-parallel plan: what each rank can do with its part (sharding.py)
sharded otherwise       nothing: ranks wait for each other in collectives that autotune does not know
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import route, sharding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRAPPERS = {  # class of a wrapper around a model -> expression on the wrapper that gives the model
    "DataParallel": ".module",
    "DistributedDataParallel": ".module",
    "DeepSpeedEngine": ".module",
    "InferenceEngine": ".module",
    "FullyShardedDataParallel": ".module",
    "OptimizedModule": "._orig_mod",
    "PeftModel": ".merge_and_unload()",
    "PeftModelForCausalLM": ".merge_and_unload()",
}


def obstacle(model: PreTrainedModel) -> str | None:
    """Why a model cannot be tuned where its weights are, in a sentence that says what to do; or None."""
    return sharding.obstacle(model) or _offloaded(model) or _missing(model) or strange(model)


def one_device(model: PreTrainedModel) -> str | None:
    """Why buffers shared by all layers (slots, graphs, compiled or recorded steps) do not fit a model, or None."""
    found = devices(model)
    if len(found) > 1:
        return f"the model is on {' and '.join(map(str, found))}; slots, graphs and compiled steps need one device"
    if any(getattr(hook, "execution_device", None) is not None for hook in _hooks(model)):
        return (
            "accelerate's hooks run between the layers although the whole model is on one device, and no graph or "
            "compiler can include them: load it with device_map set to that device alone"
        )
    return None


def devices(model: nn.Module) -> list[torch.device]:
    """The devices that hold a model's weights, in the order of its layers."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def inner(model: Any) -> str | None:
    """For a wrapper around a model: the expression that gives the model inside, in words. None for other objects."""
    cls = type(model).__name__
    return next((f"{cls}'s {how}" for name, how in WRAPPERS.items() if cls == name), None)


def keep_hook(old: nn.Module, new: nn.Module) -> None:
    """Give `new`, which replaces `old`, the hook with which accelerate moves a module's inputs to its device."""
    if (hook := getattr(old, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]

        add_hook_to_module(new, hook)


def is_patched(module: nn.Module) -> bool:
    """Whether a module's forward was replaced on the object. Accelerate's hooks do not count."""
    forwards = [vars(module).get("forward")]
    if hasattr(module, "_hf_hook"):
        if getattr(getattr(forwards[0], "func", None), "__module__", None) == "accelerate.hooks":
            forwards.clear()
        forwards.append(vars(module).get("_old_forward"))
    own = route.own_forwards(type(module))
    return any(f is not None and getattr(f, "__func__", None) not in own for f in forwards)


def unrecordable(model: nn.Module) -> str | None:
    """Which part of a model has a forward replaced on the object, which a recorded or compiled step would not call."""
    name = next((name for name, module in model.named_modules() if is_patched(module)), None)
    if name is None:
        return None
    where = f"of {name}" if name else "of the model"
    return f"the forward {where} was replaced on the object, and would be called once, when the phase is recorded"


def _offloaded(model: nn.Module) -> str | None:
    away = [name for name, module in model.named_modules() if any(map(_offloads, _flat(module)))]
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if not away and not (places & {"disk"} or ("cpu" in places and len(places) > 1)):
        return None
    where = "the disk" if "disk" in places else "the CPU"
    return (
        f"accelerate offloads {len(away) or 'some'} of its modules to {where}: every token waits for their weights on "
        "the bus, which no tuning shortens; load it in a narrower format, or on devices that hold all of it"
    )


def _missing(model: nn.Module) -> str | None:
    meta = sum(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))
    return f"{meta} of its tensors are on the meta device (never loaded); load the weights first" if meta else None


def strange(model: nn.Module) -> str | None:
    """Which of accelerate's hooks may change what a module computes, or None."""
    for name, module in model.named_modules():
        for hook in _flat(module):
            if not _aligns(hook):
                return (
                    f"{name or 'the model'} has a hook of accelerate's that may change its result "
                    f"({type(hook).__name__}); remove it with accelerate.hooks.remove_hook_from_module"
                )
    return None


def _hooks(model: nn.Module) -> Iterator[Any]:
    return (hook for module in model.modules() for hook in _flat(module))


def _flat(module: nn.Module) -> Iterable[Any]:
    """Accelerate's hooks of a module, with sequences of hooks flattened."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return ()
    return tuple(getattr(hook, "hooks", (hook,)))


def _aligns(hook: Any) -> bool:
    """Whether a hook at most moves inputs and outputs between devices. A bare `ModelHook` does nothing."""
    from accelerate.hooks import AlignDevicesHook, ModelHook

    return type(hook) in (AlignDevicesHook, ModelHook)


def _offloads(hook: Any) -> bool:
    from accelerate.hooks import CpuOffload

    return bool(getattr(hook, "offload", False)) or isinstance(hook, CpuOffload)
