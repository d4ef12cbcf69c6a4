"""Keeps a plan's packed weights between runs, so that a process that replays the plan does not quantise them again.

There is one file for a model and the transforms that pack. It is used only if no one else could have written it, its
digest is right and it fits the model; any other file is a miss and is removed. Weights are read into huge pages rather
than mapped from the file, because a decode step reads them faster there; see `runtime.kernels.arena`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch

from ..machine import cache_dir
from ..model import linear_layers, sharding
from ..runtime.kernels import PackedLinear, arena
from ..transforms.linears import LinearTransform, exchanged
from . import tensor_file
from .fingerprint import Fingerprint

if TYPE_CHECKING:
    from torch import nn

    from ..runtime.variant import Transform, Variant

log = logging.getLogger("autotune")

SCHEMA = 1  # raised whenever the same transforms would pack other numbers, or the file layout changes
MOST_BYTES = 16 << 30  # of all files together; a plan with INT8 weights of 8 billion parameters takes 9 GB
FREE_SHARE = 0.5  # share of the disk's free bytes that a file may take


class PackedWeights:
    """The packed weights of one model's plans.

    Args:
        identity: the fingerprint; only its model and versions count.
    """

    def __init__(self, identity: Fingerprint) -> None:
        self._made_of = [identity.model, dict(identity.versions)]

    def path(self, transforms: Iterable[Transform]) -> Path | None:
        """Path of the file for a plan's transforms, existing or not; None if they pack nothing or no cache lasts."""
        packing = [str(each) for each in _forms(transforms)]
        folder = cache_dir.cache("packed", lasting=True) if packing else None
        return tensor_file.path_in(folder, [SCHEMA, self._made_of, packing])

    def restore(self, original: Variant, transforms: Iterable[Transform]) -> dict[object, nn.Module]:
        """Read the layers that the transforms would make.

        Args:
            original: the variant without transforms.

        Returns:
            Layers by the key for `transforms.linears.reusing`; empty if none are kept.
        """
        if (path := self.path(transforms)) is None or sharding.ranks(original.original) > 1:
            return {}
        layers, forms = linear_layers.linears(original.original), _forms(transforms)

        def read(file: IO[bytes], size: int) -> dict[object, nn.Module]:
            parts = dict[tuple[int, str], dict[str, torch.Tensor]]()

            def put(name: str, tensor: torch.Tensor) -> None:
                form, layer, part = name.split(":")
                parts.setdefault((int(form), layer), {})[part] = tensor

            tensor_file.read(file, size, put, arena.empty)
            return {
                forms[form].key(layers[name]): _packing(forms[form]).of(layers[name], packed)
                for (form, name), packed in parts.items()
            }

        return tensor_file.restored(path, MOST_BYTES, read) or {}

    def save(self, variant: Variant) -> None:
        """Save the layers that a variant's transforms packed, unless they are kept already."""
        path = self.path(variant.transforms)
        if path is None or path.exists() or sharding.ranks(variant.original) > 1:
            return
        forms = _forms(variant.transforms)
        tensors = {
            f"{forms.index(form)}:{name}:{part}": tensor
            for name, form, _, layer in exchanged(variant)
            if form in forms and type(layer) is form.kind and isinstance(layer, PackedLinear)
            for part, tensor in layer.packed.items()
        }
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        try:
            free_bytes = shutil.disk_usage(path.parent).free
        except OSError:  # somebody removed the folder
            return
        if not tensors or size_bytes > min(MOST_BYTES, FREE_SHARE * free_bytes):
            log.debug("%s: %.1f GB are not kept, with %.1f GB free", path, size_bytes / 1e9, free_bytes / 1e9)
            return
        tensor_file.keep(path, tensor_file.head("", tensors), tensors, size_bytes, MOST_BYTES)


def _forms(transforms: Iterable[Transform]) -> list[LinearTransform]:
    """The forms of layers that transforms pack with kernels of this package."""
    exchanging = (each for each in transforms if isinstance(each, LinearTransform))
    forms = [form for each in exchanging for form in (each, each.wider) if form is not None]
    return [form for form in forms if issubclass(form.kind, PackedLinear)]


def _packing(form: LinearTransform) -> type[PackedLinear]:
    kind = form.kind
    if not issubclass(kind, PackedLinear):
        raise TypeError(f"{form} packs no layers")
    return kind
