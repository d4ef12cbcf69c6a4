"""Further inputs of a recorded step: the outputs of modules that change their own state when they run.

An example of such a module (model/stateful.py) is a rotary embedding whose frequencies depend on the length. It cannot
be part of a program, which would repeat the outputs of the recording. Instead, the module runs before each step, and
the program reads its outputs. This works if they depend only on the tokens' positions, and on nothing that the step
itself computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ....errors import TransformError
from ....model import stateful, twins
from ...cache.slot_forward import run
from ...cache.slots import SlotCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITION = 1  # position of the probe's token; no other input has this value, and it is not a size


@dataclass(frozen=True)
class ModuleCall:
    """One call of such a module during a step.

    Args:
        module: the original's module.
        args, kwargs: its arguments; those named in `moving` are replaced by the positions [B, 1] at each call.
        moving: numbers and names of the arguments that are the positions.
        count: number of tensors that it returns.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    moving: frozenset[int | str]
    count: int

    def tensors(self, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the module for positions [B, 1]. Returns its outputs."""
        args = [position if i in self.moving else value for i, value in enumerate(self.args)]
        kwargs = {key: position if key in self.moving else value for key, value in self.kwargs.items()}
        with torch.no_grad():
            out = self.module(*args, **kwargs)
        return out if isinstance(out, tuple) else (out,)


class _Stand(nn.Module):
    """The replacement of such a module in the twin: calls the module and records the call, or returns given outputs."""

    def __init__(self, module: nn.Module, book: _Book) -> None:
        super().__init__()
        self._answer = partial(book.answer, module)  # a partial, so that the module does not become a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(args, kwargs)


class _Book:
    def __init__(self, position: torch.Tensor) -> None:
        self.position = position
        self.calls: list[ModuleCall] = []
        self.ready: Iterator[tuple[torch.Tensor, ...]] | None = None  # outputs to return instead, one entry per call

    def answer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.ready is not None:
            out = next(self.ready)
            return out if len(out) > 1 else out[0]
        self.calls.append(self.noted(module, args, kwargs))
        return module(*args, **kwargs)

    def noted(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModuleCall:
        named: dict[int | str, Any] = dict(chain(enumerate(args), kwargs.items()))
        moving = frozenset(key for key, value in named.items() if self.is_position(value))
        still = {k: _blank(value) for k, value in named.items()}  # floats that the step computes are unknown before it
        out = module(*args, **kwargs)
        expected = out if isinstance(out, tuple) else (out,)
        blank = tuple(still[i] for i in range(len(args))), {key: still[key] for key in kwargs}
        call = ModuleCall(module, *blank, moving, len(expected))
        if not all(map(_equal, expected, call.tensors(self.position))):
            raise TransformError(f"what {type(module).__name__} returns depends on more than the tokens' positions")
        return call

    def is_position(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == self.position.shape and _equal(value, self.position)


def _blank(value: Any) -> Any:
    """Zeros in place of a floating-point tensor; any other value unchanged."""
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)


class ModuleCalls:
    """The calls of such modules that one step of a decode module makes, in order.

    Args:
        module: the decode module, a twin; such modules in it are replaced while it is recorded.
        cache: an empty cache of the recorded shape; the recording writes to it.
    """

    def __init__(self, module: PreTrainedModel, cache: SlotCache) -> None:
        self._module = module
        self._shared = twins.shared(module)
        batch, device = cache.shape[0], cache.slot.device
        token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._book = _Book(token + POSITION)
        if self._shared:
            with self._standing(), torch.no_grad(), stateful.ForwardState(self._shared, frozenset()).kept():
                run(module, token, self._book.position, cache.slot, cache.valid, cache.keys, cache.values)
        self.calls = tuple(self._book.calls)
        with torch.inference_mode(False), stateful.ForwardState(self._shared, frozenset()).kept():
            outputs = (call.tensors(self._book.position) for call in self.calls)
            self.tensors = [out.clone() for out in chain.from_iterable(outputs)]

    def update(self, position: torch.Tensor) -> None:
        """Run the modules for positions [B, 1], as a step of the original would. Their outputs go to `tensors`."""
        outputs = (call.tensors(position) for call in self.calls)
        for held, out in zip(self.tensors, chain.from_iterable(outputs), strict=True):
            held.copy_(out)

    @contextmanager
    def returning(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within this context, calls of such modules return `tensors`, of which there are as many as `self.tensors`."""
        left = iter(tensors)
        self._book.ready = iter([tuple(islice(left, call.count)) for call in self.calls])
        try:
            with self._standing():
                yield
        finally:
            self._book.ready = None

    @contextmanager
    def _standing(self) -> Iterator[None]:
        """Replace such modules in this twin only; every twin has its own parent modules."""
        for name, module in self._shared.items():
            self._module.set_submodule(name, _Stand(module, self._book))
        try:
            yield
        finally:
            for name, module in self._shared.items():
                self._module.set_submodule(name, module)
