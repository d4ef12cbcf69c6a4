"""Base class and helpers of the transforms that exchange linear layers."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from ..errors import TransformError
from ..machine import gpus, outside
from ..machine.device import cpu
from ..model import linear_layers
from ..runtime.kernels.modules import RoundedLinear
from ..runtime.variant import Stage, Transform

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from ..diagnose.costs import PhaseProfile, Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
BROAD = 64  # inputs and outputs of a layer; a packed one with fewer may be mostly padding, as a gate with one output is
LARGE = 2**23  # weights of a layer whose exchange leaves tens of megabytes of freed blocks behind

_made: ContextVar[dict[object, nn.Module | None] | None] = ContextVar("exchanged layers", default=None)


@contextmanager
def reusing(*variants: Variant, layers: Mapping[object, nn.Module] | None = None) -> Iterator[None]:
    """Reuse exchanged layers within this context: variants that differ in a few layers share the other layers.

    The model's weights must not change meanwhile.

    Args:
        variants: existing variants whose exchanged layers may be reused, too.
        layers: further exchanged layers, by `LinearTransform.key`.
    """
    made = _made.get()
    made = {} if made is None else made
    if layers:
        made = made | dict(layers)
    for variant in variants:
        made = made | {form.key(linear): new for _, form, linear, new in exchanged(variant)}
    token = _made.set(made)
    try:
        yield
    finally:
        _made.reset(token)


def is_made(key: object) -> bool:
    """Whether the layer with this `LinearTransform.key` would be reused here."""
    return key in (_made.get() or ())


def reuse(layers: Mapping[object, nn.Module]) -> None:
    """Let layers, by `LinearTransform.key`, be reused until the current `reusing` ends."""
    if (made := _made.get()) is not None:
        made.update(layers)


def exchanged(variant: Variant) -> Iterator[tuple[str, LinearTransform, nn.Linear, nn.Module]]:
    """Yield each layer that a variant's transforms made: its name, the transform, what it was made from, and it."""
    layers = linear_layers.linears(variant.original)
    for transform in (each for each in variant.transforms if isinstance(each, LinearTransform)):
        forms = [form for form in (transform, transform.wider) if form is not None]
        for phase in transform.phases:
            modules = dict(variant.modules[phase].named_modules())
            for name, linear in layers.items():
                new = modules.get(name)
                if isinstance(new, RoundedLinear):  # shares the tensors of the layer that was made
                    new = new.precise[0]
                yield from ((name, form, linear, new) for form in forms if new is not None and form.made(new))


@dataclass(frozen=True)
class LinearTransform(Transform):
    """Exchange every linear layer of a phase's module for `exchange(layer)`.

    Args:
        skip: comma-separated parts of the names of layers to leave unchanged: "lm_head,layers.3.mlp.down_proj".
    """

    skip: str = ""

    stage: ClassVar[Stage] = Stage.WEIGHTS
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATING  # dtypes of weights that it takes

    @property
    def capability(self) -> gpus.Capability | None:
        """The lowest compute capability of a GPU that runs the new layers; None: any."""
        return None

    @property
    def kind(self) -> type[nn.Module]:
        """The class of the new layers."""
        raise NotImplementedError

    def made(self, new: nn.Module) -> bool:
        """Whether a layer of a variant is one that this made of a plain one."""
        return isinstance(new, self.kind)

    @property
    def weight_bits(self) -> float | None:
        """Bits of a weight in the new layers, with the scales and zeros of groups; None: as many as before."""
        return None

    def exchange(self, linear: nn.Linear) -> nn.Module | None:
        """Make the layer that replaces `linear`; None leaves `linear` in place. `linear` is only read."""
        raise NotImplementedError

    def layers(self, module: nn.Module) -> Mapping[str, Any]:
        """The layers of a phase's module that it exchanges, by dotted name; each has a `weight`."""
        return linear_layers.linears(module, self.skip)

    @property
    def recipe(self) -> LinearTransform:
        """This transform without names of layers: what it does to a single layer."""
        return replace(self, skip="")

    @property
    def wider(self) -> LinearTransform | None:
        """The transform for sensitive layers, which need a wider form; None: they stay unchanged."""
        return None

    @property
    def wider_form(self) -> str:
        """The form of a sensitive layer, in words."""
        return "as it was"

    @property
    def widenings(self) -> tuple[Self, ...]:
        """This transform with each wider form that its sensitive layers may get, the narrowest first."""
        return (self,)

    def widened(self, names: str) -> Self:
        """This transform, but the layers of these names keep a wider form, besides those that already do."""
        return replace(self, skip=joined(self.skip, names))

    def refusal(self, dtype: torch.dtype) -> str | None:
        """Why layers with weights of a dtype are not exchanged, or None."""
        if dtype in self.dtypes:
            return None
        return f"it replaces weights in {' or '.join(map(str, self.dtypes))}; these are {dtype}"

    def working_bytes(self, linear: nn.Linear) -> float:
        """Bytes that making one new layer takes for a moment, with the layer; 0: hardly more than the layer."""
        return 0.0

    def missing(self, where: torch.device = CPU) -> str | None:
        """What this process lacks to run the new layers on a device, or None."""
        return None

    def speedup(self, phase: PhaseProfile, hardware: Hardware) -> float:
        """Best-case speed-up of one phase."""
        raise NotImplementedError

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {hardware.device}"
        if (reason := linear_layers.obstacle(variant.original)) is not None:
            return reason
        for phase in self.phases:
            layers = linear_layers.linears(variant.modules[phase], self.skip)
            if not layers:
                return nothing_left(variant, phase)
            for dtype in sorted({layer.weight.dtype for layer in layers.values()}, key=str):
                if reason := self.refusal(dtype):
                    return reason
        if reason := gpus.too_old(hardware, self.capability, str(self.recipe)):
            return reason
        return self.missing(variant.original.device)  # last: it may have to compile or import something

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        return {phase: self.speedup(profile.phases[phase], hardware) for phase in self.phases}

    def extra_bytes(self, variant: Variant) -> float:
        """Estimate the bytes of all new layers, and of making the largest one.

        The smallest layer is exchanged to measure its ratio of bytes, of those that are not mostly padding once packed.
        """
        modules = {id(variant.modules[phase]): variant.modules[phase] for phase in self.phases}
        total = 0.0
        for module in modules.values():
            layers = {id(layer.weight): layer for layer in linear_layers.linears(module, self.skip).values()}.values()
            broad = [layer for layer in layers if min(layer.weight.shape) >= BROAD]
            smallest = min(broad or layers, key=lambda layer: layer.weight.nbytes, default=None)
            if (made := self._sample(smallest)) is not None:
                total += made * sum(layer.weight.nbytes for layer in layers)
                total += max(self.working_bytes(layer) for layer in layers)
        return total

    def _sample(self, linear: nn.Linear | None) -> float | None:
        """Bytes that a new layer takes beside the one it replaces, divided by that one's; None if it cannot be made."""
        try:
            new = None if linear is None else self.exchange_once(linear)
        except Exception as error:  # a library may raise anything, for want of memory, too; `apply` reports it
            outside.pass_on(error)
            return None
        if linear is None or new is None:
            return None
        own = linear_layers.stored_bytes(linear, new) - linear_layers.stored_bytes(linear)
        return own / linear.weight.nbytes

    def apply(self, variant: Variant) -> None:
        # the check also loads the kernels or package, which a process that only replays a plan has not done yet
        if reason := self.missing(variant.original.device):
            raise TransformError(reason)
        for twin in variant.edit(self.phase):
            try:
                exchanged = self.exchange_in(twin)
            except ValueError as error:  # the new layer cannot hold these weights
                raise TransformError(f"{self}: {error}") from error
            if not exchanged:
                raise TransformError(f"{self}: no linear layer of {type(twin).__name__} can be exchanged")
        if variant.device.kind == "cpu":
            cpu.give_back()  # quantising a table of 152 000 rows leaves 730 MB of freed blocks behind

    def exchange_in(self, twin: nn.Module) -> int:
        """Exchange the layers of a twin. Returns how many became `kind`."""
        return linear_layers.replace(twin, self.exchange_once, self.skip)

    def exchange_once(self, linear: nn.Linear) -> nn.Module | None:
        """Exchange a layer, or within `reusing` return the layer made earlier from the same weights."""
        if (made := _made.get()) is None:
            return self._exchanged_lean(linear)
        if (key := self.key(linear)) not in made:
            made[key] = self._exchanged_lean(linear)
        return made[key]

    def _exchanged_lean(self, linear: nn.Linear) -> nn.Module | None:
        """Exchange a layer. If it is large, give the blocks that were freed back to the system before the next one."""
        new = self.exchange(linear)
        if linear.weight.numel() >= LARGE and linear.weight.device.type == "cpu":
            cpu.give_back()
        return new

    def key(self, linear: nn.Linear) -> object:
        """Identify everything that a new layer depends on."""
        weight, bias = linear.weight, linear.bias
        return self.recipe, weight.data_ptr(), weight.shape, weight.dtype, None if bias is None else bias.data_ptr()

    def took_effect(self, variant: Variant) -> str | None:
        for phase in self.phases:
            if not linear_layers.count(variant.modules[phase], self.kind):
                return f"{phase} has no {self.kind.__name__}"
        return None


@dataclass(frozen=True)
class MixedTransform(LinearTransform):
    """A `LinearTransform` whose sensitive layers get its `wider` form.

    Args:
        wide: comma-separated parts of the names of layers that get the wider form: "lm_head,layers.3.mlp.down_proj".
    """

    wide: str = ""

    @property
    def recipe(self) -> Self:
        return replace(self, skip="", wide="")

    def widened(self, names: str) -> Self:
        return replace(self, wide=joined(self.wide, names))

    def exchange_in(self, twin: nn.Module) -> int:
        narrow = linear_layers.replace(twin, self.exchange_once, joined(self.skip, self.wide))
        if self.wide and self.wider is not None:
            linear_layers.replace(twin, self.wider.exchange_once, self.skip)  # the layers that are still plain
        return narrow


def weight_bytes(phase: PhaseProfile, bits: float | None) -> float:
    """Bytes that a phase's weights would take with `bits` bits per weight; None: as many as now.

    The number of weights follows from their bytes, because layers that were not exchanged yet multiply in the dtype in
    which they are stored. Arithmetic that is no dtype ("tf32", "bfloat16x3") is over FP32.
    """
    if bits is None:
        return phase.weight_bytes
    element: torch.dtype = getattr(torch, phase.compute_dtype, torch.float32)
    return phase.weight_bytes * bits / (8 * element.itemsize)


def joined(*names: str) -> str:
    """Join comma-separated lists of names into one."""
    return ",".join(filter(None, names))


def nothing_left(variant: Variant, phase: Phase) -> str:
    for done in variant.transforms:
        if done.stage == Stage.WEIGHTS and phase in done.phases:
            return f"the linear layers of {phase} were already exchanged by {done}"
    return f"{phase} has no linear layers that can be exchanged"
