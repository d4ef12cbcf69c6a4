"""Layers that are known by what they compute: which are exchanged, which are left, and what whole models then give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autotune.errors import ChoiceError
from autotune.machine.hardware import Hardware
from autotune.model import linear_layers, seam
from autotune.runtime import kernels
from autotune.runtime.fused_decoder import FUSED
from autotune.runtime.kernels.fused import GatedMlp, RmsNorm
from autotune.runtime.variant import Variant
from autotune.transforms import fused_layers, make
from tests import models
from tests.transforms.test_contract import COMPILER

OPERATORS = kernels.available()
needs_operators = pytest.mark.skipif(OPERATORS is not None, reason=str(OPERATORS))
needs_bf16 = pytest.mark.skipif(bool(OPERATORS or kernels.no_bf16_unit()), reason="no BF16 products here")


class Norm(nn.Module):
    """An RMS norm with a twist."""

    def __init__(self, shift: float = 0.0, centred: bool = False, clipped: float = 1e9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, 24))
        self.shift = shift
        self.centred = centred
        self.clipped = clipped
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * (self.weight + self.shift)).clamp(-self.clipped, self.clipped)


@needs_operators
@pytest.mark.parametrize(
    ("module", "known"),
    [
        (Norm(), True),
        (Norm(shift=1.0), True),
        (Norm(shift=0.5), False),
        (Norm(centred=True), False),
        (Norm(clipped=0.5), False),
        (nn.RMSNorm(24, eps=1e-6), True),
        (nn.LayerNorm(24), False),
        (nn.LayerNorm(24, bias=False), False),
        (nn.Linear(24, 24, bias=False), False),
    ],
)
def test_norms(module: nn.Module, known: bool) -> None:
    new = fused_layers.norm(module.requires_grad_(False))
    assert (new is not None) == known
    if new is not None:
        for x in (torch.randn(2, 7, 24), torch.randn(3, 24) * 1e-3, torch.randn(2, 24, 5).mT):
            torch.testing.assert_close(new(x), module(x), atol=1e-6, rtol=1e-5)


class Mlp(nn.Module):
    """A gated feed-forward block with a twist."""

    def __init__(self, act: nn.Module, bias: bool = False, swapped: bool = False, clip: float | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*s, bias) for s in ((24, 40), (24, 40), (40, 24)))
        self.act_fn = act
        self.swapped = swapped
        self.clip = clip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.clip is not None:
            gate, up = gate.clamp(max=self.clip), up.clamp(-self.clip, self.clip)
        return self.down_proj(gate * self.act_fn(up) if self.swapped else self.act_fn(gate) * up)


@needs_operators
@pytest.mark.parametrize(
    ("module", "known"),
    [
        (Mlp(nn.SiLU()), True),
        (Mlp(nn.SiLU(), bias=True), True),
        (Mlp(nn.GELU(approximate="tanh")), True),
        (Mlp(nn.GELU()), False),
        (Mlp(nn.ReLU()), False),
        (Mlp(nn.SiLU(), swapped=True), False),
        (Mlp(nn.SiLU(), clip=10.0), False),  # DeepSeek V4's limit, which random inputs do not reach
        (Mlp(nn.SiLU(), clip=1000.0), False),
    ],
)
def test_gated_blocks(module: Mlp, known: bool) -> None:
    new = fused_layers.mlp(module.requires_grad_(False))
    assert (new is not None) == known
    if new is not None:
        x = torch.randn(2, 30, 24)
        torch.testing.assert_close(new(x), module(x), atol=1e-6, rtol=1e-5)


@needs_bf16
@pytest.mark.parametrize("stored", ["plain", "i8", "i6", "i4"])
@pytest.mark.parametrize(("parts", "tolerance"), [(1, 1.5e-2), (2, 1e-4)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("inputs", "hidden"), [(33, 50), (64, 96), (20, 16), (40, 72)])
def test_gated_blocks_in_bf16(
    inputs: int, hidden: int, activation: str, parts: int, tolerance: float, stored: str
) -> None:
    torch.manual_seed(inputs)
    layers = [nn.Linear(*s).requires_grad_(False) for s in ((inputs, hidden), (inputs, hidden), (hidden, inputs))]
    if stored != "plain":
        kind = {"i8": kernels.Int8Linear, "i6": kernels.Int6Linear, "i4": kernels.Int4Linear}[stored]
        layers = [kind.from_linear(layer) for layer in layers]
    new = GatedMlp(*(kernels.Bf16Linear(layer, parts) for layer in layers), activation=activation)
    for tokens in (1, 30, 48, 77, 400):
        x = torch.randn(tokens, inputs)
        hidden_numbers = fused_layers.CURVES[activation](layers[0](x).double()) * layers[1](x).double()
        exact = layers[2](hidden_numbers.float())
        assert (new(x) - exact).norm() <= tolerance * exact.norm(), tokens


@needs_operators
@pytest.mark.parametrize(
    "kinds",
    [
        *((kind,) * 3 for kind in (kernels.Int8Linear, kernels.Int6Linear, kernels.Int4Linear)),
        (kernels.Int4Linear, kernels.Int6Linear, kernels.Int8Linear),
    ],
    ids=lambda kinds: "-".join(kind.__name__ for kind in kinds),
)
@pytest.mark.parametrize(("rounds", "tolerance"), [(False, 1e-4), (True, 3e-2)], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("inputs", "hidden"), [(33, 50), (64, 96), (20, 16), (40, 72)])
def test_gated_blocks_in_integers(
    inputs: int,
    hidden: int,
    activation: str,
    rounds: bool,
    tolerance: float,
    kinds: tuple[type[kernels.QuantisedLinear], ...],
) -> None:
    torch.manual_seed(inputs)
    sizes = ((inputs, hidden), (inputs, hidden), (hidden, inputs))
    linears = [nn.Linear(*size).requires_grad_(False) for size in sizes]
    layers = [kind.from_linear(linear) for kind, linear in zip(kinds, linears, strict=True)]
    if not layers[0].in_integers or (rounds and any(kernels.no_byte_unit(layer.bits) for layer in layers)):
        pytest.skip("this processor has no such products in integers")
    new = GatedMlp(*(map(kernels.RoundedLinear, layers) if rounds else layers), activation=activation)
    for tokens in (1, 2, 31, 33, 77, 400):
        x = torch.randn(tokens, inputs)
        gate, up = (F.linear(x.double(), layer.dequantize().double(), layer.bias.double()) for layer in layers[:2])
        hidden_numbers = fused_layers.CURVES[activation](gate) * up
        expected = F.linear(hidden_numbers, layers[2].dequantize().double(), layers[2].bias.double())
        assert (new(x) - expected).norm() <= tolerance * expected.norm(), tokens


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


@needs_operators
@pytest.mark.parametrize(("batch", "depth"), [(1, 64), (2, 20), (3, 2)])
@pytest.mark.parametrize("shared", [True, False], ids=["one set of angles", "angles for each sequence"])
def test_rotary_operator(batch: int, depth: int, shared: bool) -> None:
    q = torch.randn(batch, 12, 6, depth).transpose(1, 2)
    k, cos, sin = torch.randn(batch, 2, 12, depth), *torch.randn(2, 1 if shared else batch, 12, depth)
    got = torch.ops.autotune.rotary(q, k, cos, sin)
    for new, old in zip(got, (q, k), strict=True):
        torch.testing.assert_close(new, old * cos[:, None] + rotate_half(old) * sin[:, None], atol=1e-6, rtol=1e-5)


@needs_operators
@pytest.mark.parametrize("activation", [0, 1])
def test_gate_operator(activation: int) -> None:
    curve = [F.silu, lambda x: F.gelu(x, approximate="tanh")][activation]
    for shape in ((3, 5), (1, 1000), (2, 7, 17)):
        gate, up = torch.randn(shape) * 4, torch.randn(shape)
        torch.testing.assert_close(torch.ops.autotune.gate_up(gate, up, activation), curve(gate) * up)
    edges = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30, torch.nan])
    got = torch.ops.autotune.gate_up(edges, torch.ones(6), activation)
    torch.testing.assert_close(got, curve(edges), atol=1e-7, rtol=1e-6, equal_nan=True)


# architecture, norms, gated blocks, layers whose rotary embedding is exchanged, decoder layers
KNOWN = [
    ("llama", 5, 2, 2, 2),
    ("qwen3", 9, 2, 2, 2),
    ("gemma3", None, 2, 2, 0),
    ("mistral-window", 5, 2, 2, 2),
    ("phi3", 5, 0, None, 0),
    ("mixtral", 5, 0, 2, 0),
]


def forwards(model: nn.Module, kind: str) -> int:
    """The number of modules whose forward was exchanged for one of a kind."""
    return sum(hasattr(module.__dict__.get("forward"), kind) for module in model.modules())


@needs_operators
@pytest.mark.parametrize(("architecture", "norms", "blocks", "rotated", "layers"), KNOWN)
def test_whole_models(architecture: str, norms: int | None, blocks: int, rotated: int | None, layers: int) -> None:
    model = models.tiny(architecture, initializer_range=0.1)
    transform = make("fused_layers", {}, "prefill")
    assert transform.unavailable(Variant(model), COMPILER) is None
    candidate = Variant(model).with_transform(transform)
    prefill = candidate.modules["prefill"]
    assert linear_layers.count(prefill, GatedMlp) == blocks
    if norms is not None:
        assert linear_layers.count(prefill, RmsNorm) == norms
    if rotated is not None:
        assert forwards(prefill, seam.ROTARY) == rotated
    assert forwards(prefill, FUSED) == layers
    assert transform.unavailable(candidate, COMPILER) is not None
    batch = models.left_padded()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(prefill(**batch).logits[real], model(**batch).logits[real], atol=1e-4, rtol=1e-3)


@needs_operators
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_models_with_nothing_known(architecture: str) -> None:
    reason = make("fused_layers", {}, "prefill").unavailable(Variant(models.tiny(architecture)), COMPILER)
    assert "of a known form" in (reason or "")


@needs_operators
def test_what_is_hooked_is_left() -> None:
    model = models.tiny("llama")
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    prefill = Variant(model).with_transform(make("fused_layers", {}, "prefill")).modules["prefill"]
    handle.remove()
    assert type(prefill.model.norm) is type(model.model.norm)
    assert isinstance(prefill.model.layers[0].input_layernorm, RmsNorm)


@needs_bf16
def test_everything_for_prefill_together() -> None:
    model = models.tiny("llama", initializer_range=0.1)
    plan = [("linear_bf16x3", {}), ("prefill_attention", {"precision": "bfloat16x3"}), ("fused_layers", {})]
    transforms = [make(name, params, "prefill") for name, params in plan]
    candidate = Variant(model).with_transforms(reversed(transforms))
    assert all(transform.took_effect(candidate) is None for transform in transforms)
    ids = torch.tensor(models.token_prompts(count=2, length=40))
    with torch.no_grad():
        torch.testing.assert_close(candidate.modules["prefill"](ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)
    assert linear_layers.stored_bytes(*candidate.modules.values()) == linear_layers.stored_bytes(model)


@pytest.mark.parametrize(("phase", "device"), [("decode", None), ("both", None), ("prefill", "cuda")])
def test_refused(phase: str, device: str | None) -> None:
    if device is None:
        with pytest.raises(ChoiceError, match="'prefill'"):
            make("fused_layers", {}, phase)
        return
    hardware: dict[str, Any] = {**vars(COMPILER), "device": device}
    reason = make("fused_layers", {}, phase).unavailable(Variant(models.tiny("llama")), Hardware(**hardware))
    assert "for CPUs" in (reason or "")
