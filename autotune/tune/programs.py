"""Keeps a plan's recorded steps between runs, so that a process that replays the plan does not record them again.

There is one file for a plan and a shape of step. It is used only if no one else could have written it, its digest is
right and it fits the model; any other file is a miss and is removed.
"""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ..machine import cache_dir
from ..model import seam
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

    The code of the modules' forwards counts, too: somebody may have replaced it for all models. So do the products that
    the operators were built for: a step is lowered to them, and others would not find them.
    """

    def __init__(self, identity: Fingerprint, transforms: Iterable[Transform]) -> None:
        self._made_of = [identity.model, identity.hardware, dict(identity.versions), list(map(str, transforms))]

    def path(self, module: nn.Module, inputs: Inputs) -> Path | None:
        """Path of the file for a step with such inputs, existing or not; None if there is no lasting cache."""
        from ..runtime import kernels

        if kernels.available() is not None:
            return None
        made_of = [SCHEMA, self._made_of, kernels.least_digits(), seam.experts(module), _code(module), inputs]
        return tensor_file.path_in(cache_dir.cache("programs", lasting=True), made_of)

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Within this context, steps that are kept are not recorded."""
        from ..runtime.steps.program import kept

        with kept.reusing(self):
            yield

    def find(self, module: nn.Module, inputs: Inputs) -> Lowered | None:
        """The step of a module for such inputs, or None."""
        from ..runtime.steps.program import kept

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
        from ..runtime.steps.program import StepPrograms, kept

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


def _code(module: nn.Module) -> str:
    """Digest of the code of every forward in a module, but not of functions that they call."""
    kinds = set(map(type, module.modules()))
    forwards: dict[str, Any] = {
        f"{kind.__module__}.{kind.__qualname__}": getattr(kind, "forward", None) for kind in kinds
    }
    seen = hashlib.blake2b(digest_size=16)
    for name, forward in sorted(forwards.items()):
        code = getattr(inspect.unwrap(forward), "__code__", None)
        seen.update("\n".join([name, *(_words(code) if code is not None else ())]).encode())
    return seen.hexdigest()


def _words(code: types.CodeType) -> Iterator[str]:
    """What a function's code consists of, but for where it stands."""
    yield from (code.co_code.hex(), repr(code.co_names), repr(code.co_varnames))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)
        else:
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
