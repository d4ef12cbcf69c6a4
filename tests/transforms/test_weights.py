"""What narrower weights do to the numbers: every linear transform against the original, layer and model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from autotune.diagnose.costs import PhaseProfile, Profile
from autotune.errors import TransformError
from autotune.machine.hardware import Hardware
from autotune.model import linear_layers
from autotune.runtime import kernels
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.transforms import make
from autotune.transforms.linear_dtype import CastLinear
from autotune.transforms.linears import LinearTransform, weight_bytes
from autotune.transforms.step_program import StepProgram
from autotune.workload import PHASES
from tests import models
from tests.models import tiny, token_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = {
    "device": "cpu",
    "name": "test",
    "capability": "AVX2",
    "threads": 2,
    "memory_bytes": 2**34,
    "bandwidth_bytes_per_s": 25e9,
    "compiler": "g++",
    "versions": {},
}
AVX2 = Hardware(**CPU, flops_per_s={"float32": 140e9, "bfloat16": 0.15e9, "float16": 0.15e9, "int8": 200e9})
AMX = Hardware(**CPU, flops_per_s={"float32": 400e9, "bfloat16": 2700e9, "float16": 100e9, "int8": 3000e9})

# name, parameters, largest relative error of one layer, largest mean KL divergence of a tiny model in nats
ACCURACY = [
    ("weight_storage", {"dtype": "float16"}, 3e-4, 1e-5),
    ("weight_storage", {"dtype": "bfloat16"}, 3e-3, 5e-4),
    ("weight_only", {"bits": 8, "group": 32}, 8e-3, 2e-3),
    ("weight_only", {"bits": 8, "group": 0}, 1.2e-2, 5e-3),
    ("weight_only", {"bits": 6, "group": 32}, 0.025, 1e-2),
    ("weight_only", {"bits": 4, "group": 32}, 0.1, 0.2),
    ("weight_only", {"bits": 4, "group": 32, "rounding": "compensated"}, 0.1, 0.15),
    ("linear_dtype", {"dtype": "bfloat16"}, 6e-3, 1e-3),
    ("linear_dtype", {"dtype": "float16"}, 1e-3, 5e-5),
    ("dynamic_int8", {}, 3e-2, 5e-2),
    ("torchao", {"scheme": "int8_weight_only", "compile": False}, 1.2e-2, 5e-3),
    ("torchao", {"scheme": "int8_dynamic", "compile": False}, 2e-2, 1e-2),
    ("torchao", {"scheme": "float8_weight_only", "compile": False}, 4e-2, 2e-2),
    ("bitsandbytes", {"scheme": "int8"}, 2e-2, 1e-2),
    ("bitsandbytes", {"scheme": "int8_vectorwise"}, 2e-2, 1e-2),
    ("bitsandbytes", {"scheme": "nf4"}, 0.12, 0.4),
    ("bitsandbytes", {"scheme": "fp4"}, 0.15, 0.6),
]


def linear_transform(name: str, params: dict[str, Any], phase: str = "both") -> LinearTransform:
    transform = make(name, params, phase)
    assert isinstance(transform, LinearTransform)
    if (reason := transform.missing()) is not None:
        pytest.skip(reason)
    return transform


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 96), (70, 33), (128, 64)], ids=str)  # [out, in]; whole blocks and not
@pytest.mark.parametrize(("name", "params", "error"), [row[:3] for row in ACCURACY])
def test_one_layer(name: str, params: dict[str, Any], error: float, shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias).requires_grad_(False)
    transform = linear_transform(name, params, "prefill")  # where packed layouts are used; the next test has others
    new = transform.exchange(linear)
    assert isinstance(new, transform.kind)
    for x in (torch.randn(1, 1, shape[1]), torch.randn(2, 70, shape[1]), torch.randn(5, shape[1], 3).mT):
        expected, got = linear(x), new(x)
        assert got.shape == expected.shape
        assert got.dtype == torch.float32
        assert (got - expected).norm() <= error * expected.norm()


ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of a result, beside the error of the weights


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("name", "params", "error"), [row[:3] for row in ACCURACY])
def test_one_layer_of_a_narrow_model(name: str, params: dict[str, Any], error: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96).requires_grad_(False).to(dtype)
    transform = linear_transform(name, params, "decode")
    if (reason := transform.refusal(dtype)) is not None:
        assert "already" in reason
        return
    new = transform.exchange(linear)
    for x in (torch.randn(1, 1, 64).to(dtype), torch.randn(2, 70, 64).to(dtype)):
        expected, got = copy.deepcopy(linear).float()(x.float()), new(x)
        assert got.dtype == dtype
        assert (got.float() - expected).norm() <= (error + ROUNDING[dtype]) * expected.norm()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("name", "params", "divergence"), [(*row[:2], row[3]) for row in ACCURACY])
def test_one_narrow_model(name: str, params: dict[str, Any], divergence: float, dtype: torch.dtype) -> None:
    model = models.tiny("llama", initializer_range=0.1).to(dtype)
    transform, variant = linear_transform(name, params), Variant(model)
    if (reason := transform.unavailable(variant, AVX2)) is not None:
        assert "already" in reason
        return
    candidate = variant.with_transform(transform)
    ids = torch.tensor(models.token_prompts(count=4, length=32))
    assert serving(candidate).generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (4, 35)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids).logits.double(), -1) for m in (model, candidate.modules["decode"]))
    assert (p.exp() * (p - q)).sum(-1).mean().item() <= divergence + 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("name", "params", "divergence"), [(*row[:2], row[3]) for row in ACCURACY])
def test_one_model(name: str, params: dict[str, Any], divergence: float, architecture: str) -> None:
    model = models.tiny(architecture, initializer_range=0.1)
    candidate = Variant(model).with_transform(linear_transform(name, params)).modules["decode"]
    ids = torch.tensor(models.token_prompts(count=4, length=32))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids).logits.double(), -1) for m in (model, candidate))
    measured = (p.exp() * (p - q)).sum(-1).mean().item()
    assert 0 < measured <= divergence


def test_float16_refuses_what_it_cannot_hold(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    variant = Variant(llama)
    for name in ("weight_storage", "linear_dtype"):
        transform = linear_transform(name, {"dtype": "float16"})
        with pytest.raises(TransformError, match="float16"):
            variant.with_transform(transform)
    variant.with_transform(linear_transform("weight_storage", {"dtype": "bfloat16"}))


@pytest.mark.parametrize(
    ("name", "params", "phase", "dtype", "says"),
    [
        ("linear_dtype", {"dtype": "bfloat16"}, "both", torch.bfloat16, "the weights are in torch.bfloat16 already"),
        ("linear_dtype", {"dtype": "float16"}, "both", torch.bfloat16, None),
        ("linear_bf16", {}, "prefill", torch.bfloat16, "replaces weights in torch.float32; these are torch.bfloat16"),
        ("weight_only", {}, "both", torch.float64, "these are torch.float64"),
        ("weight_only", {}, "both", torch.float16, None),
    ],
)
def test_which_dtypes_are_taken(
    name: str, params: dict[str, Any], phase: str, dtype: torch.dtype, says: str | None
) -> None:
    reason = linear_transform(name, params, phase).unavailable(Variant(models.tiny("llama").to(dtype)), AVX2)
    assert reason is None if says is None else says in (reason or "")


def test_half_precision_can_be_narrowed_further(llama: PreTrainedModel) -> None:
    """On a GPU an FP32 model goes to BF16 first; what is quantised then are those weights."""
    half, quarter = make("linear_dtype", {"dtype": "float16"}), linear_transform("dynamic_int8", {}, "decode")
    variant = Variant(llama).with_transform(half)
    assert quarter.unavailable(variant, AVX2) is None
    candidate = variant.with_transform(quarter)
    assert quarter.took_effect(candidate) is None
    assert linear_layers.count(candidate.modules["decode"], CastLinear) == 0
    assert linear_layers.count(candidate.modules["prefill"], CastLinear) == 15
    assert str(half) in (make("linear_dtype", {}).unavailable(candidate, AVX2) or "")


@pytest.mark.parametrize("name", ["weight_storage", "weight_only", "dynamic_int8"])
def test_only_on_a_cpu(name: str, llama: PreTrainedModel) -> None:
    gpu = Hardware(**CPU | {"device": "cuda"}, flops_per_s={"float32": 1e13})
    assert "not on cuda" in (make(name, {}).unavailable(Variant(llama), gpu) or "")


def test_skipped_layers_are_left(llama: PreTrainedModel) -> None:
    transform = linear_transform("dynamic_int8", {"skip": "lm_head,q_proj"}, "decode")
    candidate = Variant(llama).with_transform(transform).modules["decode"]
    assert type(candidate.lm_head) is nn.Linear
    assert type(candidate.model.layers[0].self_attn.q_proj) is nn.Linear
    assert type(candidate.model.layers[0].self_attn.k_proj) is transform.kind
    everything = ",".join(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"))
    assert "no linear layers" in (make("dynamic_int8", {"skip": everything}).unavailable(Variant(llama), AVX2) or "")


def test_phases_take_different_weights(llama: PreTrainedModel) -> None:
    decode, prefill = linear_transform("dynamic_int8", {}, "decode"), linear_transform("linear_dtype", {}, "prefill")
    candidate = Variant(llama).with_transform(decode)
    assert prefill.unavailable(candidate, AMX) is None
    candidate = candidate.with_transform(prefill)
    assert decode.took_effect(candidate) is None
    assert prefill.took_effect(candidate) is None
    assert "already exchanged by dynamic_int8@decode" in (
        linear_transform("weight_storage", {}, "decode").unavailable(candidate, AMX) or ""
    )


@pytest.mark.skipif(kernels.available() is not None, reason="needs a compiler")
def test_what_quantising_freed_is_given_back(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr("autotune.machine.device.cpu.give_back", lambda: given.append(True))
    Variant(llama).with_transform(make("weight_only", {"bits": 4}, "decode"))
    assert given


def profile_of(
    linear_s: float, other_s: float, weight_bytes: float, flops: float, compute_dtype: str = "float32"
) -> Profile:
    phases = {
        phase: PhaseProfile(
            phase=phase,
            samples_s=(linear_s + other_s,),
            flops=flops,
            weight_bytes=weight_bytes,
            cache_bytes=0,
            busy=0.9,
            compute_dtype=compute_dtype,
            linear_s=linear_s,
            attention_s=0,
            attention_flops=0,
            operator_count=1,
            sync_s=0,
            operators=(),
        )
        for phase in ("prefill", "decode")
    }
    return Profile(phases, (), (), None, 1, 1)


# 500 MB of weights at 25 GB/s take 20 ms, halved 10 ms, at INT8 with FP16 scales per 32 (9 of 32 bits less 3/4) 5.3 ms


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", 1e6), ("bfloat16", 2e6), ("tf32", 1e6), ("bfloat16x3", 1e6)]
)
def test_weights_are_counted_by_what_they_are_stored_in(dtype: str, expected: float) -> None:
    profile = profile_of(0.1, 0.0, weight_bytes=4e6, flops=1e9, compute_dtype=dtype)
    assert weight_bytes(profile.phases["decode"], 8) == expected


DECODE = profile_of(linear_s=0.020, other_s=0.010, weight_bytes=500e6, flops=0.25e9)
# 70 GFLOP take 500 ms at 140 GFLOP/s and 25.9 ms at 2700 GFLOP/s
PREFILL = profile_of(linear_s=0.500, other_s=0.100, weight_bytes=500e6, flops=70e9)


# the same in BF16: half the bytes in half the time, so that INT8 saves half of that, not three quarters
NARROW = profile_of(linear_s=0.010, other_s=0.010, weight_bytes=250e6, flops=0.25e9, compute_dtype="bfloat16")
# 0.25 GFLOP in BF16 take 1.67 s where 0.15 GFLOP/s are emulated
EMULATED = profile_of(linear_s=1.670, other_s=0.010, weight_bytes=250e6, flops=0.25e9, compute_dtype="bfloat16")
FAST = Hardware(**CPU, flops_per_s={"float32": 400e9, "bfloat16": 2700e9})
H100 = Hardware(
    **CPU | {"device": "cuda", "capability": "9.0"},
    flops_per_s={"float32": 50e9, "bfloat16": 700e9, "float16": 650e9},
)


@pytest.mark.parametrize(
    ("name", "params", "profile", "hardware", "speedup"),
    [
        ("weight_storage", {}, DECODE, AVX2, 0.030 / (0.010 + 0.010)),
        ("weight_only", {}, DECODE, AVX2, 0.030 / (0.010 + 0.020 * 8.5 / 32)),
        ("weight_only", {"bits": 6}, DECODE, AVX2, 0.030 / (0.010 + 0.020 * 6.5 / 32)),
        ("weight_only", {"bits": 4, "group": 64}, DECODE, AVX2, 0.030 / (0.010 + 0.020 * 4.5 / 32)),
        ("weight_only", {"group": 0}, DECODE, AVX2, 0.030 / (0.010 + 0.005)),
        ("weight_only", {}, PREFILL, AVX2, 0.600 / (0.100 + 70 / 210)),
        ("dynamic_int8", {}, DECODE, AVX2, 0.030 / (0.010 + 0.005)),
        ("dynamic_int8", {}, PREFILL, AVX2, 0.600 / (0.100 + 70 / 200)),
        ("linear_dtype", {}, PREFILL, AMX, 0.600 / (0.100 + 70 / 2700)),
        ("linear_dtype", {}, PREFILL, AVX2, 0.600 / (0.100 + 70 / 0.15)),
        ("linear_dtype", {"dtype": "float16"}, PREFILL, AMX, 0.600 / (0.100 + 70 / 100)),
        ("weight_only", {"group": 0}, NARROW, FAST, 0.020 / (0.010 + 0.005)),
        ("torchao", {"scheme": "int8_weight_only"}, NARROW, FAST, 0.020 / (0.010 + 0.005)),
        ("torchao", {"scheme": "int4_weight_only"}, NARROW, FAST, 0.020 / (0.010 + 0.003125)),  # 5 bits a weight
        ("torchao", {"scheme": "int4_hqq"}, NARROW, FAST, 0.020 / (0.010 + 0.003125)),
        ("triton_weights", {}, NARROW, FAST, 0.020 / (0.010 + 0.0053125)),
        ("triton_weights", {"bits": 4}, NARROW, FAST, 0.020 / (0.010 + 0.003125)),
        ("triton_weights", {"bits": 4, "group": 128}, NARROW, FAST, 0.020 / (0.010 + 0.00265625)),
        ("bitsandbytes", {"scheme": "nf4"}, NARROW, FAST, 0.020 / (0.010 + 0.0028125)),  # 4.5 bits a weight
        ("bitsandbytes", {"scheme": "fp4"}, NARROW, FAST, 0.020 / (0.010 + 0.0028125)),
        ("weight_storage", {}, NARROW, FAST, 1.0),
        ("weight_only", {"group": 0}, EMULATED, AVX2, 1.680 / (0.010 + 0.005)),
        ("weight_storage", {"dtype": "bfloat16"}, EMULATED, AVX2, 1.680 / (0.010 + 0.010)),
        ("torchao", {"scheme": "float8_dynamic"}, PREFILL, H100, 0.600 / (0.100 + 70 / 1400)),
    ],
)
def test_prediction(name: str, params: dict[str, Any], profile: Profile, hardware: Hardware, speedup: float) -> None:
    assert make(name, params).predict(profile, hardware) == pytest.approx({"prefill": speedup, "decode": speedup})
    assert make(name, params, "decode").predict(profile, hardware) == pytest.approx({"decode": speedup})


@pytest.mark.parametrize(
    ("name", "params", "bits"),
    [
        ("weight_only", {"bits": 8}, 8 + 16 / 32),
        ("weight_only", {"bits": 8, "group": 0}, 8),
        ("weight_only", {"bits": 6}, 6 + 16 / 32),
        ("weight_only", {"bits": 6, "group": 0}, 6),
        ("weight_only", {"bits": 4, "group": 64}, 4 + 2 * 16 / 64),
        ("triton_weights", {}, 8 + 16 / 32),
        ("triton_weights", {"group": 128}, 8 + 16 / 128),
        ("triton_weights", {"bits": 4, "group": 64}, 4 + 2 * 16 / 64),
        ("torchao", {"scheme": "int8_weight_only"}, 8),
        ("torchao", {"scheme": "float8_weight_only"}, 8),
        ("bitsandbytes", {"scheme": "nf4"}, 4 + 32 / 64),
        ("bitsandbytes", {"scheme": "fp4"}, 4 + 32 / 64),
        ("bitsandbytes", {"scheme": "int8"}, 8),
        ("linear_dtype", {}, None),
    ],
    ids=str,
)
def test_a_layer_holds_the_bits_that_are_promised(
    name: str, params: dict[str, Any], bits: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name == "triton_weights":
        pytest.importorskip("triton")  # without it there is no layer; a GPU only multiplies by it
    transform: Any = make(name, params) if name == "triton_weights" else linear_transform(name, params)
    assert transform.weight_bits == bits
    if bits is None:
        return
    layer = transform.exchange(nn.Linear(2048, 64, bias=False).requires_grad_(False))
    assert 8 * layer.weight_bytes / (2048 * 64) == pytest.approx(bits, rel=0.003)  # and a scale a row


@pytest.mark.skipif(kernels.available() is not None or kernels.no_bf16_unit() is not None, reason="needs a BF16 unit")
@pytest.mark.parametrize("name", ["linear_bf16", "linear_bf16x3"])
def test_prefill_shares_the_weights_that_decode_is_packed_in(name: str) -> None:
    model = tiny("llama")
    shared = make(name, {"weights": "decode"}, "prefill")
    with pytest.raises(TransformError, match="no packed weights"):
        Variant(model).with_transform(shared)
    variant = Variant(model).with_transforms([make("weight_only", {"bits": 8}, "decode"), shared])
    held = [
        linear_layers.stored_bytes(*(variant.modules[phase] for phase in phases)) for phases in (("decode",), PHASES)
    ]
    assert held[0] == held[1]
    ids = torch.tensor(token_prompts(2))
    plain = Variant(model).with_transform(make("weight_only", {"bits": 8}, "both"))
    got, expected = (v.modules["prefill"](ids).logits for v in (variant, plain))
    assert float((got - expected).norm() / expected.norm()) < 0.03


@pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
@pytest.mark.parametrize("name", ["weight_storage", "weight_only", "dynamic_int8"])
def test_what_a_program_can_record_says_so(name: str) -> None:
    made = Variant(tiny("llama")).with_transform(make(name, {}, "decode"))
    recording = StepProgram("decode", slots=32)
    if made.transforms[0].recordable:
        assert recording.unavailable(made, AVX2) is None
        assert recording.took_effect(made.with_transform(recording)) is None
    else:
        assert "cannot read the weights of dynamic_int8" in str(recording.unavailable(made, AVX2))
        with pytest.raises(TransformError, match="a program cannot read"):
            made.with_transform(recording)
