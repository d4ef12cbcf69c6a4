"""Find which part of a model a module belongs to, by structure and by names that all architectures share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION, FFN, NORM, CACHE, HEAD = "attention", "FFN", "norm", "KV-cache update", "lm_head"
RANGE = "autotune.section."  # prefix of the name of a part's range in a trace
COMPILED, OVERHEAD, OTHER = "compiled step", "framework overhead", "other"
GROUPS = (ATTENTION, FFN, NORM, CACHE, HEAD, COMPILED, OTHER, OVERHEAD)  # the order of the operator table

_NORM = re.compile(r"norm|(^|_)ln(_|$)")
_ATTENTION = re.compile(r"attention|attn")
_FFN = re.compile(r"mlp|moe|ffn|feed_?forward|experts|^fc\d$")  # fc1, fc2: OPT has no module around them


def sections(model: PreTrainedModel) -> dict[str, str]:
    """Map module names to groups, for the outermost module of each part and for every norm."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = dict[str, str]()
    for name, module in model.named_modules():
        group = HEAD if module is head else _group(name.rpartition(".")[2], module)
        inside = owner(name.rpartition(".")[0], found)
        if group is not None and (inside is None or (group == NORM and inside != NORM)):
            found[name] = group
    return found


def owner(name: str, found: dict[str, str]) -> str | None:
    """Return the group of the nearest module at or above `name`; None if there is none."""
    while name:
        if name in found:
            return found[name]
        name = name.rpartition(".")[0]
    return None


def _group(attribute: str, module: nn.Module) -> str | None:
    words = f"{attribute.lower()} {type(module).__name__.lower()}"
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return None
    if _NORM.search(type(module).__name__.lower()) or (_NORM.search(attribute.lower()) and not list(module.children())):
        return NORM
    if _ATTENTION.search(words) and "layer" not in type(module).__name__.lower():
        return ATTENTION
    return FFN if _FFN.search(attribute.lower()) or _FFN.search(type(module).__name__.lower()) else None
