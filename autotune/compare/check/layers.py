"""Records each layer's output in a small form, and finds where a model begins to differ.

Hidden states are kept as count sketches: every element is added, with a sign, to one of `WIDTH` sums. A hash of its
index chooses both. On average, distances between sketches equal those between the states. With n sketches, the relative
error of a squared distance is about sqrt(2 / (n WIDTH)) (Charikar, Chen and Farach-Colton, Finding Frequent Items in
Data Streams, 2002): about 4 % for the tokens that are read here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...model.configured import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = 64  # sums in a sketch
PROMPTS, READ, KEPT = 4, 64, 16  # number of prompts, tokens read of each, and last of these tokens that are kept
QUIET = 1e-4  # relative deviation that another machine's order of summation may cause in float32
JUMP = 3.0  # least ratio to the deviation of the layers before; a deviation passed on grows less from layer to layer


@dataclass(frozen=True)
class Shift:
    """A layer's output compared with the recorded one.

    Args:
        name: module name, such as "model.layers.7".
        deviation: norm of the difference / norm of the recorded output; infinite if it is not finite.
    """

    name: str
    deviation: float


def sketch(states: torch.Tensor) -> torch.Tensor:
    """Sketch states [..., N] as float32 [..., WIDTH]."""
    place, sign = _hashes(states.shape[-1])
    flat = states.detach().cpu().float()
    return torch.zeros(*flat.shape[:-1], WIDTH, dtype=torch.float32, device="cpu").index_add_(-1, place, flat * sign)


@functools.lru_cache(maxsize=8)
def _hashes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum and the sign for each of `count` elements, by MurmurHash3's finaliser."""
    bits = np.arange(1, count + 1, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    bits ^= bits >> np.uint32(16)
    place = torch.from_numpy((bits % WIDTH).astype(np.int64))
    return place, torch.from_numpy((((bits >> 16) & 1) * 2.0 - 1.0).astype(np.float32))


def stages(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The embedding, every decoder layer and the head, by name, in the order of computing."""
    depth = getattr(text_config(model), "num_hidden_layers", None)
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    loose: Any = model  # transformers' own types are loose here
    found = [loose.get_input_embeddings(), *(stacks[0] if stacks else ()), loose.get_output_embeddings()]
    return {names[id(module)]: module for module in found if id(module) in names}


def fingerprint(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Sketches [tokens, WIDTH] of each stage's output for the last tokens of `prompts`, read in direct forwards."""
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, []).append(sketch(states[0, -KEPT:]))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in stages(model).items()]
    try:
        with torch.no_grad():
            for prompt in prompts:
                ids = torch.tensor([prompt[-READ:]], dtype=torch.int64, device=model.device)  # [1, P]
                model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def shifts(recorded: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> tuple[Shift, ...]:
    """Deviation of each stage that both have from the recorded output, in the order of computing. Pure."""
    both = [(name, recorded[name], found[name]) for name in recorded if name in found]
    return tuple(Shift(name, _deviation(was, now)) for name, was, now in both if was.shape == now.shape)


def _deviation(was: torch.Tensor, now: torch.Tensor) -> float:
    found = float((now - was).norm() / was.norm().clamp_min(1e-30))
    return found if math.isfinite(found) else math.inf


def first_jump(found: Sequence[Shift]) -> str | None:
    """The first stage that deviates clearly more than its input explains; None if all agree. Pure.

    If the deviation only grows slowly, as in a model that is quantised throughout, that is the first layer.
    """
    before = 0.0
    for shift in found:
        if shift.deviation > max(QUIET, JUMP * before):
            return shift.name
        before = max(before, shift.deviation)
    return None
