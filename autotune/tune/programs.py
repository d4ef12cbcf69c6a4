"""Keeps a plan's recorded steps between runs, so that a process that replays the plan does not record them again.

There is one file for a plan and a shape of step. It is used only if no one else could have written it, its digest is
right and it fits the model; any other file is a miss and is removed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch

from ..machine import cache_dir
from ..model import seam
from ..runtime.steps.program import StepPrograms, kept
from . import tensor_file
from .fingerprint import Fingerprint

if TYPE_CHECKING:
    from torch import nn

    from ..runtime.steps.program.kept import Inputs
    from ..runtime.steps.program.lower import Lowered
    from ..runtime.variant import Transform, Variant

SCHEMA = 1  # raised whenever the same step would be lowered to other instructions, or the file layout changes
MOST_BYTES = 256 << 20  # of all files together; a step of SmolLM2-135M takes 0.4 MB
TEXT = "text"  # the tensor that holds the program; the others are its folded values


class PlanPrograms:
    """The recorded steps of one plan.

    Args:
        identity: the fingerprint; only its model, hardware and versions count.
        transforms: of the plan.
    """

    def __init__(self, identity: Fingerprint, transforms: Iterable[Transform]) -> None:
        self._made_of = [identity.model, identity.hardware, dict(identity.versions), list(map(str, transforms))]

    def path(self, module: nn.Module, inputs: Inputs) -> Path | None:
        """Path of the file for a step with such inputs, existing or not; None if there is no lasting cache."""
        key = json.dumps([SCHEMA, self._made_of, seam.experts(module), inputs], sort_keys=True)
        folder = cache_dir.cache("programs", lasting=True)
        return folder and folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"

    def find(self, module: nn.Module, inputs: Inputs) -> Lowered | None:
        """The step of a module for such inputs, or None."""
        if (path := self.path(module, inputs)) is None:
            return None

        def read(file: IO[bytes], size: int) -> Lowered:
            tensors = dict[str, torch.Tensor]()
            tensor_file.read(file, size, tensors.__setitem__)
            text = bytes(tensors.pop(TEXT).numpy()).decode()
            return kept.read(text, tensors, module)

        return tensor_file.restored(path, MOST_BYTES, read)

    def save(self, variant: Variant) -> None:
        """Save the steps that a variant has recorded, unless they are kept already."""
        if not isinstance(variant.step, StepPrograms):
            return
        for program in variant.step.programs:
            path = self.path(variant.step.module, kept.inputs_of(program.lowered))
            if path is None or path.exists() or (found := kept.written(program.lowered, variant.step.module)) is None:
                continue
            text, folded = found
            tensors = {**folded, TEXT: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
            size_bytes = sum(tensor.nbytes for tensor in tensors.values())
            tensor_file.keep(path, tensor_file.head("", tensors), tensors, size_bytes, MOST_BYTES)
