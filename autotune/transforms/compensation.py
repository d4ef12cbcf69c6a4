"""INT4 layers whose rounding errors are compensated for what they read (GPTQ), and what making them takes."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from ..model import linear_layers
from ..runtime import kernels, own_texts
from ..runtime.kernels import compensated as rounding

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant

MOST_INPUTS = 8192  # of a layer; its time for each weight and its memory grow with them
MOST_S = 30.0  # seconds that the arithmetic may take at the peak: a tenth of a search, which does it about twice
TOKENS = own_texts.ROWS * own_texts.LENGTH
MATRICES = 6  # [K, K] in FP32 that are alive at once


def layers(module: nn.Module, skip: str) -> dict[str, nn.Linear]:
    """The layers of a module that can be compensated, by dotted name."""
    found = linear_layers.linears(module, skip)
    return {name: layer for name, layer in found.items() if layer.in_features <= MOST_INPUTS}


def compensated(
    variant: Variant, twin: PreTrainedModel, found: Mapping[str, nn.Linear], group: int
) -> dict[str, kernels.Int4Linear]:
    """Make the layers that replace those of a twin, one after another, while it reads texts that the model wrote.

    Each is made for what it reads in the twin as it is, so it does not depend on which others are made.

    Args:
        variant: that of the twin.
        twin: it is only read.
        found: from `layers`.
        group: inputs that share a scale; 0 for one scale per output row.

    Returns:
        New layers by name, without those that read nothing, or nothing finite.
    """
    made = dict[str, kernels.Int4Linear]()
    last: list[torch.Tensor] = []  # what the last layer read, and its moments: others read the same

    def make(name: str, inputs: torch.Tensor) -> None:
        if not last or last[0] is not inputs:
            last[:] = inputs, rounding.moments(inputs)
        with suppress(ValueError):
            made[name] = kernels.Int4Linear.for_inputs(found[name], last[1], group)

    if found:
        with variant.turn() if variant.state.modules else nullcontext():
            own_texts.read(
                twin, own_texts.written(variant.original), {name: twin.get_submodule(name) for name in found}, make
            )
    return made


def delay(found: Mapping[str, nn.Linear], hardware: Hardware) -> str | None:
    """Why compensating takes too long, or None if it does not, or the machine's peak was not measured."""
    peak = hardware.flops_per_s.get("float32")
    if not peak or (seconds := flops(found.values()) / peak) <= MOST_S:
        return None
    return f"compensating its rounding takes about {seconds:.0f} s, {MOST_S:.0f} s are the most"


def flops(found: Collection[nn.Linear]) -> float:
    """FLOPs of compensating layers: to write texts and read them, for moments, their factors, and for rounding."""
    total = 0.0
    for layer in found:
        outputs, inputs = layer.out_features, layer.in_features
        total += 4 * TOKENS * inputs * outputs + 2 * TOKENS * inputs**2 + 2 * inputs**3 + outputs * inputs**2
    return total


def room_bytes(found: Mapping[str, nn.Linear]) -> float:
    """Bytes that compensating takes meanwhile."""
    inputs = max((layer.in_features for layer in found.values()), default=0)
    return 4.0 * MATRICES * inputs**2
