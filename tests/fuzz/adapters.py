"""LoRA adapters: added to a model, switched, scaled, merged, taken away. Without any, a change does nothing."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from tests.fuzz.calls import Call, generate
from tests.fuzz.changes import FACTOR, Change, Undo

SCALE = 64.0


def lora_layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def config(model: Any) -> peft.LoraConfig:
    names = sorted(
        {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m) is nn.Linear and "lm_head" not in n}
    )
    return peft.LoraConfig(r=4, target_modules=names[:2] or ["c_attn"], init_lora_weights=False, lora_alpha=SCALE)


def inject(*names: str) -> Change:
    """Through PEFT's own injection."""

    def change(model: Any) -> Undo:
        if lora_layers(model):
            return lambda: None
        torch.manual_seed(7)
        wanted = config(model)
        for name in names:
            peft.inject_adapter_in_model(wanted, model, name)
        _activate(model, names[:1])
        model.eval()
        return None

    return change


def added(model: Any) -> Undo:
    """Through transformers' interface."""
    if lora_layers(model):
        return lambda: None
    torch.manual_seed(8)
    wanted = config(model)
    for name in ("a", "b"):
        model.add_adapter(wanted, adapter_name=name)
    model.set_adapter("a")
    model.eval().requires_grad_(False)
    return None


def _activate(model: Any, names: Any) -> None:
    for each in lora_layers(model):
        each.set_adapter(list(names))
    model.requires_grad_(False)


def switch(*names: str) -> Change:
    def change(model: Any) -> Undo:
        found = lora_layers(model)
        known = [name for name in names if found and name in found[0].lora_A]
        if not found or not known:
            return lambda: None
        was = list(found[0].active_adapters)
        _activate(model, known)
        return lambda: _activate(model, was)

    return change


def off(model: Any) -> Undo:
    def enable(on: bool) -> None:
        for each in lora_layers(model):
            each.enable_adapters(on)
        model.requires_grad_(False)

    on = not any(each.disable_adapters for each in lora_layers(model))
    enable(False)
    return lambda: enable(on)


def row_by_row(model: Any, call: Call) -> Any:
    """One tenant's adapter for each sequence, as PEFT's models do it: by hooks, for one call."""
    tenants = [("a", "__base__", "b")[row % 3] for row in range(call.rows)]

    def choose(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "adapter_names": tenants}

    handles = [each.register_forward_pre_hook(choose, with_kwargs=True) for each in lora_layers(model)]
    try:
        return generate(model, call, return_dict_in_generate=True, output_logits=True)
    finally:
        for handle in handles:
            handle.remove()


def scaled(model: Any) -> Undo:
    was = [(each, dict(each.scaling)) for each in lora_layers(model)]
    for each, scales in was:
        each.scaling.update({name: scale * FACTOR for name, scale in scales.items()})
    return lambda: [each.scaling.update(scales) for each, scales in was]


def merged(model: Any) -> Undo:
    for each in lora_layers(model):
        each.merge()
    return None if lora_layers(model) else lambda: None


def deleted(model: Any) -> Undo:
    found = [each for each in lora_layers(model) if "b" in each.lora_A]
    for each in found:
        each.delete_adapter("b")
    model.requires_grad_(False)
    return None if found else lambda: None


@torch.no_grad()
def written(model: Any) -> Undo:
    found = lora_layers(model)
    for each in found:
        for layer in each.lora_B.values():
            layer.weight.data.mul_(FACTOR)
    return None if found else lambda: None


def _fitting() -> bool:
    """Whether this release of PEFT is one that transformers' interface takes."""
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


ADAPTERS: dict[str, Change] = {
    "adapters": inject("a", "b"),
    **({"adapters of transformers": added} if _fitting() else {}),
    "adapter b": switch("b"),
    "both adapters": switch("a", "b"),
    "adapters off": off,
    "adapters scaled": scaled,
    "adapters merged": merged,
    "adapter deleted": deleted,
    "adapters written": written,
}
