"""Letting the original go: the model object takes over layers of the plan, and its own weights are freed.

The object stays what it was, with its class, configuration and handle. Its layers are then those of the plan's prefill,
which take any number of tokens, so that calls which the plan cannot serve run through them in transformers' own loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import StateError
from .sites import stored_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from .variant import Variant

PLAIN = (torch.Tensor, nn.Parameter)
RELOAD = "the original's weights were released; load the model again"


def releasable_bytes(model: PreTrainedModel, variant: Variant) -> int:
    """Bytes of the model's weights that no module of the variant uses."""
    serving = variant.modules.values()
    return stored_bytes(model, *serving) - stored_bytes(*serving)


def release(model: PreTrainedModel, variant: Variant) -> None:
    """Make `model`, and every alias of it, consist of the variant's prefill module; no call may be under way.

    From then on it refuses `state_dict`, with it `save_pretrained`, and `load_state_dict`: its weights are no longer
    those that its class and configuration describe.
    """
    module = variant.modules["prefill"]
    originals = {t.untyped_storage().data_ptr() for t in _tensors(model)} - {0}
    for kind in ("_modules", "_parameters", "_buffers"):  # in place: aliases share the dictionaries
        held, new = getattr(model, kind), dict(getattr(module, kind))
        held.clear()
        held.update(new)
    _move(variant, originals)
    trim()
    model.register_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]


def _move(variant: Variant, originals: set[int]) -> None:
    """Give what is left of the original memory of its own: one tensor of a checkpoint keeps the whole file mapped."""
    moved: dict[int, torch.UntypedStorage] = {}
    left = {id(t): t for module in variant.modules.values() for t in _tensors(module)}
    for tensor in left.values():
        storage = tensor.untyped_storage()
        if (where := storage.data_ptr()) in originals and where not in moved:
            moved[where] = storage.clone()  # type: ignore[no-untyped-call]
    for tensor in left.values():
        if (own := moved.get(tensor.untyped_storage().data_ptr())) is not None:
            place = tensor.storage_offset(), tensor.shape, tensor.stride()
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(own, *place)
    if variant.step is not None and hasattr(variant.step, "forget"):
        variant.step.forget()  # recorded steps hold on to addresses


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Everything with memory that a model computes with, plain attributes of exchanged layers included."""
    attributes = chain.from_iterable(vars(module).values() for module in model.modules())
    for value in chain(model.parameters(), model.buffers(), attributes):
        if type(value) in PLAIN and value.layout is torch.strided:  # packed and foreign kinds show no storage
            yield value


def trim() -> None:
    """Give memory back: layers may refer to themselves, and glibc keeps freed blocks of up to 32 MiB to itself."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _refuse(*_: Any) -> None:
    raise StateError(f"this model has no weights of its own to save or to load into: {RELOAD} for that")
