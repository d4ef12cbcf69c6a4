"""16-bit layers in FP32 arithmetic: what they compute, what they share, when they promise something, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autotune.model import linear_layers
from autotune.runtime import kernels
from autotune.runtime.variant import Variant
from autotune.transforms import make, wide_arithmetic
from autotune.transforms.wide_arithmetic import FEWEST_ROWS, PART_BYTES, WideLinear
from autotune.validate.exam import Exam
from autotune.validate.sensitivity import LayerProbe
from tests.models import tiny, token_prompts
from tests.transforms.test_packed_prefill import CPU, FAST, SLOW
from tests.transforms.test_weights import profile_of

WIDE = make("wide_arithmetic", {}, "prefill")
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place, relative


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_layer_is_rounded_once(dtype: torch.dtype, bias: bool, parts: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 100, bias=bias, dtype=dtype)
    wide = WideLinear(linear)
    wide._rows = -(-100 // parts)
    x = torch.randn(2, FEWEST_ROWS, 64, dtype=dtype)
    with torch.no_grad():
        got = wide(x)
        exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    assert got.dtype == dtype
    assert got.shape == (2, FEWEST_ROWS, 100)
    torch.testing.assert_close(got.double(), exact, rtol=1.01 * ROUNDING[dtype], atol=1e-5)


def test_few_rows_are_the_layers_own() -> None:
    linear = nn.Linear(64, 32, dtype=torch.bfloat16)
    x = torch.randn(FEWEST_ROWS - 1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(WideLinear(linear)(x), linear(x))


@pytest.mark.parametrize("columns", [64, PART_BYTES])
def test_a_part_of_the_weights_is_bounded_and_never_empty(columns: int) -> None:
    rows = WideLinear(nn.Linear(columns, 8, device="meta", dtype=torch.bfloat16))._rows
    assert rows == max(1, PART_BYTES // (4 * columns))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_model_says_the_same_but_for_rounding(architecture: str, dtype: torch.dtype) -> None:
    model = tiny(architecture, initializer_range=0.1)
    exact, model = Variant(model), tiny(architecture, initializer_range=0.1).to(dtype)
    candidate = Variant(model).with_transform(WIDE)
    assert WIDE.unavailable(Variant(model), CPU) is None
    assert WIDE.extra_bytes(Variant(model)) == 0
    assert WIDE.took_effect(candidate) is None
    assert WIDE.took_effect(Variant(model)) is not None
    assert candidate.modules["decode"] is model
    assert linear_layers.stored_bytes(model, candidate.modules["prefill"]) == linear_layers.stored_bytes(model), (
        "a copy was kept"
    )
    ids = torch.tensor(token_prompts(count=4, length=32))
    with torch.no_grad():
        given = (exact.modules["prefill"], model, candidate.modules["prefill"])
        truth, own, wide = (torch.log_softmax(m(ids).logits.double(), -1) for m in given)
    away, apart = ((truth.exp() * (truth - said)).sum(-1).mean().item() for said in (own, wide))
    assert apart <= 1.2 * away + 1e-9, "further from FP32 than the model's own arithmetic"


@pytest.mark.parametrize(
    ("dtype", "hardware", "said"),
    [(torch.float32, CPU, "these are torch.float32"), (torch.bfloat16, replace(CPU, device="cuda"), "not on cuda")],
)
def test_refusals(dtype: torch.dtype, hardware: object, said: str) -> None:
    assert said in str(WIDE.unavailable(Variant(tiny("llama").to(dtype)), hardware))


@pytest.mark.parametrize(("peaks", "least", "most"), [(SLOW, 7.0, 10.0), (FAST, 0.1, 0.99)])
def test_it_promises_what_fp32_arithmetic_saves(peaks: dict[str, float], least: float, most: float) -> None:
    seconds = 64e9 / peaks["bfloat16"]
    profile = profile_of(seconds, 0.3 if peaks is SLOW else 0.0, weight_bytes=1e9, flops=64e9, compute_dtype="bfloat16")
    assert least < WIDE.predict(profile, replace(CPU, flops_per_s=peaks))["prefill"] < most


@pytest.mark.parametrize(
    ("emulated", "dtype"), [(True, torch.bfloat16), (True, torch.float32), (False, torch.bfloat16)]
)
def test_an_exam_reads_so_where_16_bits_are_emulated(
    emulated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.validate.exam.emulated", lambda given: emulated and given == torch.bfloat16)
    calls = list[int]()
    forward = WideLinear.forward
    monkeypatch.setattr(WideLinear, "forward", lambda self, x: calls.append(x.shape[1]) or forward(self, x))
    model = tiny("llama").to(dtype)
    exam = Exam.prepare(model, token_prompts(16), size="quick", pad_token_id=0)
    assert exam.problem is None
    calls.clear()
    exam.reference(exam.batches[0], stepped=True)
    assert not calls, "what is stepped is the model's own arithmetic"
    exam.reference((exam.texts[5],))
    exam.reference(exam.batches[0])
    assert bool(calls) == (emulated and dtype == torch.bfloat16)


def test_a_forward_of_its_own_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.validate.exam.emulated", lambda given: True)
    model = tiny("llama").bfloat16()
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    exam = Exam.prepare(model, token_prompts(16), size="quick", pad_token_id=0)
    assert exam.reader.transforms == ()


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_emulated(supported: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: supported, raising=False)
    assert wide_arithmetic.emulated(dtype) == (dtype != torch.float32 and not supported)


@pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
@pytest.mark.parametrize("phase", ["decode", "both"])
def test_layers_are_compared_in_the_arithmetic_of_their_reference(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one layer exchanged alone, the others multiply as the original is read."""
    model = tiny("llama", initializer_range=0.1).bfloat16()
    found, calls = [], list[int]()
    forward = WideLinear.forward
    monkeypatch.setattr(WideLinear, "forward", lambda self, x: calls.append(1) or forward(self, x))
    for emulated in (False, True):
        monkeypatch.setattr("autotune.validate.exam.emulated", lambda given, wide=emulated: wide)
        exam = Exam.prepare(model, token_prompts(16), size="quick", pad_token_id=0)
        probe = LayerProbe(exam, Variant(model), make("weight_only", {"bits": 4}, phase), "strict")
        calls.clear()
        found.append([probe.divergence(list(probe.layers)[:1]), probe.divergence(list(probe.layers))])
        assert bool(calls) == emulated
    narrow, wide = found
    assert wide == pytest.approx(narrow, rel=0.5)
    assert 1e-5 < wide[0] < wide[1]
