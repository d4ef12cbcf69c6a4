"""One fused operator each for norms, gated feed-forward blocks and rotary embeddings of a known form, two for a decoder
layer of such parts (`runtime.fused_decoder`), and one for all layers of a short prompt (`runtime.fused_stack`).

A layer is recognised by what it computes: before the exchange, the layer and its replacement must give the same results
for the same random inputs.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..model import seam
from ..runtime import fused_decoder, fused_stack, kernels
from ..runtime.kernels.fused import GatedMlp, RmsNorm
from ..runtime.variant import Stage, Transform

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

CLOSE = 1e-5  # largest relative error between two results; the order of a sum alone causes less
LARGE = 1e4  # times as large inputs show a clip inside a block
EPSILONS = ("variance_epsilon", "eps", "epsilon")
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
CURVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class FusedLayers(Transform):
    """Exchange the layers between prefill's matmuls for ones that read their activations only once."""

    name: ClassVar[str] = "fused_layers"
    stage: ClassVar[Stage] = Stage.LAYERS
    summary: ClassVar[str] = "prefill's decoder layers in one CPU kernel, or two around attention, or one for each part"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.phase != "prefill":
            raise ChoiceError("fused_layers: phase must be 'prefill'; for one token activations are small")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device != "cpu":
            return f"the kernels are for CPUs; this model runs on {hardware.device}"
        model = variant.modules["prefill"]
        if fused(model):
            return "the layers of prefill were already exchanged"
        if next(model.parameters()).dtype != torch.float32:
            return f"the kernels compute in FP32, this model in {next(model.parameters()).dtype}"
        if reason := kernels.available():
            return reason
        if next(_exchanges(model), None) is None:
            return f"{type(model).__name__} has no norm, feed-forward block or rotary embedding of a known form"
        return None

    def rehearsed(self) -> Transform:
        return self

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: only the time of matmuls and attention remains."""
        return {"prefill": ceilings.less_overhead(profile.phases["prefill"], hardware)}

    def apply(self, variant: Variant) -> None:
        if reason := kernels.available():
            raise TransformError(reason)
        for twin in variant.edit("prefill"):
            with torch.no_grad():
                found = list(_exchanges(twin))
            for name, new in found:
                if isinstance(new, nn.Module):
                    twin.set_submodule(name, new.eval())
                else:
                    module = twin.get_submodule(name)
                    module.forward = types.MethodType(new, module)
            with torch.no_grad():
                for make in (fused_decoder.fused_forward, fused_stack.stacked_forward):
                    made = [(module, make(module)) for module in twin.modules()]
                    for module, forward in made:
                        if forward is not None:
                            module.forward = types.MethodType(forward, module)

    def took_effect(self, variant: Variant) -> str | None:
        return None if fused(variant.modules["prefill"]) else "prefill has no fused layers"


def fused(model: nn.Module) -> int:
    """The number of fused layers of a model."""
    return sum(
        isinstance(m, RmsNorm | GatedMlp) or hasattr(m.__dict__.get("forward"), seam.ROTARY) for m in model.modules()
    )


def _exchanges(model: nn.Module) -> Iterator[tuple[str, nn.Module | types.FunctionType]]:
    """Yield the name of each exchangeable module with its replacement: a module, or a new forward function."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or _observed(module):
            continue
        new = norm(module) or mlp(module) or with_rotary(module)
        if new is not None:
            yield name, new


def _observed(module: nn.Module) -> bool:
    """Whether hooks or a replaced forward change what a call of this module does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def norm(module: nn.Module) -> RmsNorm | None:
    """The replacement of an RMS norm, which is scaled by its weight or, as in Gemma, by its weight plus one."""
    eps = next((value for key in EPSILONS if isinstance(value := getattr(module, key, None), float)), None)
    if eps is None or any(True for _ in module.children()):
        return None
    own = dict(module.named_parameters())
    if set(own) != {"weight"} or own["weight"].dim() != 1:
        return None
    if len(inspect.signature(seam.forward_function(module)).parameters) != 2:  # self and the input
        return None
    weight = own["weight"]
    sizes = torch.tensor([3.0, eps**0.5], dtype=torch.float32, device="cpu")  # eps matters only for the second
    x = _random(2, 3, len(weight)) * sizes[:, None, None]
    for scale in (weight, weight.detach() + 1):
        if _agree(module, new := RmsNorm(scale, eps), x):
            return new
    return None


def mlp(module: nn.Module) -> GatedMlp | None:
    """The replacement of down(activation(gate(x)) * up(x)), or None if the module computes something else."""
    children = dict(module.named_children())
    if set(children) != MLP or next(module.parameters(recurse=False), None) is not None:
        return None
    if any(_observed(child) for child in children.values()):
        return None
    gate, up, down = (children[name] for name in ("gate_proj", "up_proj", "down_proj"))
    inputs = getattr(gate, "in_features", None)
    if not isinstance(inputs, int):
        return None
    for name, curve in CURVES.items():
        if _agree(children["act_fn"], curve, torch.linspace(-8, 8, 65, dtype=torch.float32, device="cpu")):
            new = GatedMlp(gate, up, down, name)
            x = _random(1, 3, inputs)
            return new if _agree(module, new, x) and _agree(module, new, LARGE * x) else None
    return None


def with_rotary(module: nn.Module) -> types.FunctionType | None:
    """The forward of a module that rotates queries and keys, with only the rotating function replaced."""
    forward = seam.forward_function(module)
    if not isinstance(forward, types.FunctionType) or forward.__closure__:
        return None
    if seam.ROTARY not in forward.__code__.co_names:
        return None
    rotate = forward.__globals__.get(seam.ROTARY)
    q, k, cos, sin = _random(1, 3, 5, 16), _random(1, 2, 5, 16), _random(1, 5, 16), _random(1, 5, 16).flip(-1)
    if not callable(rotate) or not _agree(rotate, torch.ops.autotune.rotary, q, k, cos, sin):
        return None
    names = forward.__globals__ | {seam.ROTARY: _rotary_or(rotate)}
    new = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    new.__kwdefaults__ = forward.__kwdefaults__
    setattr(new, seam.ROTARY, True)
    return new


def _rotary_or(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the fused operator if it takes the inputs, else the model's own function."""

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (q, k, cos, sin))
        fits = cos.dim() == 3 and all(
            t.dim() == 4 and t.shape[2:] == cos.shape[1:] and t.stride(3) == 1 for t in (q, k)
        )
        if args or kwargs or not plain or not fits or cos.shape[0] not in (1, q.shape[0]) or q.requires_grad:
            return original(q, k, cos, sin, *args, **kwargs)
        return torch.ops.autotune.rotary(q, k, cos, sin)

    return rotate


def _agree(one: Callable[..., Any], other: Callable[..., Any], *inputs: torch.Tensor) -> bool:
    """Whether two functions give the same numbers. A function that rejects these inputs counts as different."""
    try:
        results = [one(*inputs), other(*inputs)]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    expected, got = ([r] if isinstance(r, torch.Tensor) else list(r) for r in results)
    return len(expected) == len(got) and all(map(_same, expected, got))


def _same(expected: Any, got: torch.Tensor) -> bool:
    if not isinstance(expected, torch.Tensor) or expected.shape != got.shape:
        return False
    size = expected.abs().amax(-1, keepdim=True)  # per row, so that rows of small numbers are compared as strictly
    return bool(((expected - got).abs() <= CLOSE * size).all())


def _random(*shape: int) -> torch.Tensor:
    draw = torch.Generator(device="cpu").manual_seed(len(shape))
    return torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
