"""The original weights of a wrapped model: on its device, parked in the host's memory, or released.

Without them, the model object consists of the layers of the plan's prefill. Those take any number of tokens, so calls
that the plan cannot serve run through them in transformers' loop. The object keeps its identity, class, configuration
and handle.
"""

from __future__ import annotations

import enum
from contextlib import contextmanager, suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import StateError, TransformError
from ..machine import device as devices
from ..machine import forking
from ..model.linear_layers import stored_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from transformers import PreTrainedModel

    from ..machine.device import Device
    from ..runtime.variant import Variant


class Residence(enum.StrEnum):
    """Where the original's weights are."""

    RESIDENT = "resident"  # on the model's device
    PARKED = "parked"  # in the host's memory
    RELEASED = "released"


PLAIN = (torch.Tensor, nn.Parameter)
KINDS = ("_modules", "_parameters", "_buffers")
RELOAD = "the original's weights were released; load the model again"
UNPARK = "the original's weights are parked; call .autotune.rollback() first"


class Original:
    """Where the original weights of `model` are. No call may be under way when they are moved or freed.

    Args:
        model: the wrapped model. Its aliases share its dictionaries of modules, so these are edited in place.

    Attributes:
        place: where they are now.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.place = Residence.RESIDENT
        self._model = model
        self._tree: dict[str, dict[str, Any]] = {}
        self._parked: dict[torch.device, list[torch.Tensor]] = {}  # by the device they came from
        self._hooks: list[Any] = []
        forking.tell(self)

    def after_fork(self) -> None:
        """Undo what a thread of the parent was doing: nobody goes on with it in the child."""
        if self.place is Residence.RESIDENT and self._tree:
            self._put_back()
            self._parked = {}
            self._remove_hooks()

    def release(self, variant: Variant) -> None:
        """Permanently free the weights that the variant does not use. If that fails, nothing has changed."""
        if self.place is Residence.PARKED:
            self._tree = {}
            self._parked = {}
            self._forbid_saving(RELOAD)
        else:
            theirs = {where(t) for t in tensors(self._model)} - {0}
            with self._or_as_before():
                self._become(variant, RELOAD)
                _move(variant, theirs)
            self._tree = {}
        self.place = Residence.RELEASED
        devices.of(variant.original).trim()

    def park(self, variant: Variant) -> None:
        """Move the weights that the variant does not use to the host's memory. If that fails, nothing has changed.

        Raises:
            StateError: the device is a CPU, so the weights are in the host's memory already.
        """
        device = devices.of(self._model)
        if device.kind == "cpu":
            raise StateError("the original is in the CPU's own memory already: keep it there, or release it")
        used = {where(t) for module in variant.modules.values() for t in tensors(module)}
        for tensor in {id(t): t for t in tensors(self._model) if where(t) not in used}.values():
            self._parked.setdefault(tensor.device, []).append(tensor)
        with self._or_as_before():
            self._become(variant, UNPARK)
            for group in self._parked.values():
                relocate(group, torch.device("cpu"))
        self.place = Residence.PARKED
        device.trim()

    @property
    def device(self) -> Device:
        """The device that the weights belong on."""
        return devices.of(next(iter(self._parked), None) or self._model)

    @property
    def parked_bytes(self) -> int:
        """Bytes needed on the device to bring the original back."""
        return sum({where(t): t.untyped_storage().nbytes() for t in chain(*self._parked.values())}.values())

    def restore(self) -> None:
        """Move the parked weights back. The model is then bit-identical to what it was."""
        for home, group in self._parked.items():
            if away := [tensor for tensor in group if tensor.device != home]:
                relocate(away, home)
        self._put_back()
        self._parked = {}
        self._remove_hooks()
        self.place = Residence.RESIDENT

    def give_up_plan(self) -> None:
        """Let nothing in the model object refer to the plan's layers. Until `restore` succeeds, it refuses all calls.

        The layers are the original's again, but their weights are parked still.
        """
        self._put_back()
        self._hooks.append(self._model.register_forward_pre_hook(_refusal(f"no call can be answered: {UNPARK}")))

    def _put_back(self) -> None:
        for kind, was in self._tree.items():
            _replace(getattr(self._model, kind), was)
        self._tree = {}

    def require(self, what: str) -> None:
        """Raise StateError if the weights were released.

        Args:
            what: the operation that needs them, for the message.
        """
        if self.place is Residence.RELEASED:
            raise StateError(f"cannot {what}: {RELOAD}")

    def is_parked(self, what: str) -> bool:
        """Whether the weights are parked. Raises StateError as `require`."""
        self.require(what)
        return self.place is Residence.PARKED

    @contextmanager
    def _or_as_before(self) -> Iterator[None]:
        """Keep the model's dictionaries, and give them and its weights back if the body raises: memory may run out."""
        self._tree = {kind: dict(getattr(self._model, kind)) for kind in KINDS}
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def _become(self, variant: Variant, remedy: str) -> None:
        module = variant.modules["prefill"]
        for kind in KINDS:
            _replace(getattr(self._model, kind), dict(getattr(module, kind)))
        self._forbid_saving(remedy)

    def _forbid_saving(self, remedy: str) -> None:
        """Make `state_dict` (and so `save_pretrained`) and `load_state_dict` raise.

        The weights are no longer those that the model's class and configuration describe.
        """

        refuse = _refusal(f"this model has no weights of its own to save or to load into: {remedy} for that")
        self._remove_hooks()
        model: Any = self._model
        self._hooks = [model.register_state_dict_pre_hook(refuse), model.register_load_state_dict_pre_hook(refuse)]

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def releasable_bytes(model: PreTrainedModel, variant: Variant) -> int:
    """Bytes of the model's weights that no module of the variant uses."""
    serving = variant.modules.values()
    return stored_bytes(model, *serving) - stored_bytes(*serving)


def tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield every tensor with storage that a model computes with, including plain attributes of exchanged layers."""
    attributes = chain.from_iterable(vars(module).values() for module in model.modules())
    for value in chain(model.parameters(), model.buffers(), attributes):
        if type(value) in PLAIN and value.layout is torch.strided:  # packed and foreign kinds expose no storage
            yield value


def where(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage; equal for tied tensors and views."""
    return tensor.untyped_storage().data_ptr()


def relocate(group: Iterable[torch.Tensor], home: torch.device) -> None:
    """Move tensors into new storage on `home`. They stay the same objects, and those that shared storage still do."""
    moved: dict[int, torch.UntypedStorage] = {}
    for tensor in group:
        storage = tensor.untyped_storage()
        if (old := storage.data_ptr()) not in moved:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            moved[old] = flat.to(home, copy=True).untyped_storage()
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=home).set_(moved[old], *place)


def _move(variant: Variant, theirs: set[int]) -> None:
    """Copy the original's tensors that the variant still uses into new storage.

    Otherwise one tensor of a checkpoint keeps the whole file mapped.
    """
    left = {id(t): t for module in variant.modules.values() for t in tensors(module) if where(t) in theirs}
    shapes = () if variant.step is None else tuple(variant.step.shapes)
    try:
        for home in {t.device for t in left.values()}:
            relocate([t for t in left.values() if t.device == home], home)
    finally:
        for holder in (variant.step, variant.prompts, variant.speculation):
            if holder is not None:
                holder.forget()  # what is recorded holds the old addresses
    _record_again(variant, shapes)


def _record_again(variant: Variant, shapes: Iterable[tuple[int, int]]) -> None:
    """Record the host's steps for caches of these shapes (rows, slots) now, before what recording frees is given back.

    The first request would wait for it, and its memory would stay with the process.
    """
    pool, step = variant.caches, variant.step
    for rows, slots in shapes:
        if pool is not None and step is not None and pool.slots == slots and (cache := pool.empty(rows)) is not None:
            with suppress(TransformError):  # the first request records it, or says why not
                step.fitting(cache)


def _refusal(said: str) -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise StateError(said)

    return refuse


def _replace(held: dict[str, Any], new: dict[str, Any]) -> None:
    """Replace a dictionary's contents in place, because aliases of the model share it."""
    held.clear()
    held.update(new)
