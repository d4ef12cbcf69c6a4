"""Weight formats for GPUs without one: what each needs, shapes and dtypes on fake tensors, numbers where a CPU can.

FP8's dynamic scheme asks for the hardware first and then multiplies through `torch._scaled_mm`, which a CPU has, too:
without the question its numbers can be checked here. INT4's packing and kernel exist on GPUs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from autotune.errors import TransformError
from autotune.machine import device as devices
from autotune.runtime.dispatch import serving
from autotune.runtime.steps import compiled
from autotune.runtime.variant import Variant
from autotune.transforms import bitsandbytes, make, torchao
from autotune.transforms.cuda_graph import uncapturable
from tests import models
from tests.fakes.cuda import FakeCuda
from tests.machine.test_fake_cuda import during_a_capture
from tests.transforms.test_contract import COMPILER

if TYPE_CHECKING:
    from autotune.machine.hardware import Hardware

GPU = replace(COMPILER, device="cuda", name="a GPU", flops_per_s={"float32": 60e12, "bfloat16": 700e12})
HALVES = (torch.bfloat16, torch.float16, torch.float32)


def gpu(capability: str) -> Hardware:
    return replace(GPU, capability=capability)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in (torchao, bitsandbytes):
        module._missing.cache_clear()
    yield
    for module in (torchao, bitsandbytes):
        module._missing.cache_clear()


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao is told that the hardware is there."""
    quant_api = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularities: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))


@pytest.mark.parametrize(
    ("name", "scheme", "capability", "needed"),
    [
        ("torchao", "float8_dynamic", "8.6", "8.9"),
        ("torchao", "float8_weight_only", "8.0", "8.9"),
        ("torchao", "int4_weight_only", "7.5", "8.0"),
        ("torchao", "int4_hqq", "7.5", "8.0"),
        ("torchao", "int8_dynamic", "7.5", "8.0"),
        ("torchao", "int8_weight_only", "6.1", "7.0"),
        ("bitsandbytes", "int8", "7.0", "7.5"),
        ("bitsandbytes", "int8_vectorwise", "7.0", "7.5"),
        ("torchao", "float8_weight_only", "8.9", None),
        ("torchao", "float8_weight_only", "12.0", None),
        ("torchao", "int8_weight_only", "7.0", None),
        ("bitsandbytes", "int8", "7.5", None),
        ("bitsandbytes", "nf4", "6.1", None),
    ],
)
def test_what_a_scheme_needs_of_a_gpu(name: str, scheme: str, capability: str, needed: str | None) -> None:
    variant = Variant(models.tiny("llama").bfloat16())
    reason = make(name, {"scheme": scheme}, "decode").unavailable(variant, gpu(capability))
    if needed is None:
        assert reason is None
    else:
        assert reason is not None
        assert f"needs compute capability {needed} or later; this GPU is" in reason
        assert scheme in reason


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("scheme", "bytes_each"),
    [
        ("int8_weight_only", 1.0),
        ("int8_dynamic", 1.0),
        ("int4_weight_only", 0.625),  # 4 bits, and a scale and a zero in BF16 for every 32
        ("int4_hqq", 0.625),
        ("float8_weight_only", 1.0),
        ("float8_dynamic", 1.0),
    ],
)
def test_shapes_dtypes_and_bytes(
    scheme: str, bytes_each: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = pytest.importorskip("torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor")
    hqq = "_choose_qparams_and_quantize_affine_hqq"
    monkeypatch.setattr(tiles, hqq, partial(getattr(tiles, hqq), optimize=False))  # optimising looks at values,
    monkeypatch.setattr(torchao, "without_zero_rows", lambda weight: weight)  # and so does this
    with FakeTensorMode():
        linear = nn.Linear(1024, 2048, bias=True, dtype=dtype)
        layer = torchao.TorchaoLinear(linear, scheme, compiled=False)
        for shape in ((1, 1), (2, 17)):
            y = layer(torch.empty(*shape, 1024, dtype=dtype))
            assert (y.shape, y.dtype) == ((*shape, 2048), dtype)
    assert layer.weight_bytes == pytest.approx(bytes_each * 1024 * 2048, rel=0.02)


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_of_dynamic_fp8(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 128, bias, dtype=dtype).requires_grad_(False)
    layer = torchao.TorchaoLinear(linear, "float8_dynamic", compiled=False)
    for x in (torch.randn(1, 1, 64, dtype=dtype), torch.randn(2, 70, 64, dtype=dtype)):
        expected, got = linear(x), layer(x)
        assert got.dtype == dtype
        assert (got - expected).norm() <= 0.05 * expected.norm()  # three bits of mantissa on either side


@pytest.fixture
def unpacked(able: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """Quantise a weight to INT4 on a CPU and back; the kernel's order of bytes exists on GPUs alone."""
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda packed, tiles: packed)

    def there_and_back(weight: torch.Tensor, scheme: str) -> torch.Tensor:
        found: Any = torchao.quantized(weight, scheme)
        numbers = torch.stack([found.qdata >> 4, found.qdata & 15], -1).view(len(weight), -1, 32).float()
        scales, zeros = found.scale_and_zero.float().permute(2, 1, 0)[..., None]  # [N, groups, 1] each
        return ((numbers - 8) * scales + zeros).flatten(1)[:, : weight.shape[1]]

    return there_and_back


@pytest.mark.parametrize("shape", ["normal", "heavy tails", "zeros and constants"])
def test_hqq_loses_less_than_plain_int4(shape: str, unpacked: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(64, 1056)
    if shape == "heavy tails":
        weight *= torch.randn(64, 1056).exp()
    elif shape == "zeros and constants":
        weight[:, :64], weight[:, 64:96] = 0, 0.5
    weight = weight.bfloat16()
    plain, hqq = ((unpacked(weight, each) - weight).norm() for each in ("int4_weight_only", "int4_hqq"))
    assert hqq < 0.98 * plain
    assert plain < 0.15 * weight.norm()


@pytest.mark.usefixtures("unpacked")
def test_nothing_is_captured_while_torchao_releases_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """HQQ calls torch.cuda.empty_cache(), which the allocator refuses during a capture."""
    fake, weight = FakeCuda(), torch.randn(8, 64).bfloat16()
    monkeypatch.setattr(torch.cuda, "empty_cache", fake.release)
    assert during_a_capture(fake, lambda: torchao.quantized(weight, "int4_hqq")) == [None]
    assert fake.trims


@pytest.mark.parametrize("scheme", ["float8_weight_only", "int8_weight_only"])
def test_rows_of_zeros(scheme: str) -> None:
    """A padded vocabulary has some; torchao alone would make them NaN in FP8."""
    for dtype in HALVES:
        linear = nn.Linear(64, 48, bias=False, dtype=dtype).requires_grad_(False)
        linear.weight[40:] = 0
        before = linear.weight.clone()
        y = torchao.TorchaoLinear(linear, scheme, compiled=False)(torch.randn(3, 64, dtype=dtype))
        assert torch.isfinite(y).all()
        assert y[:, 40:].abs().max() < 1e-3
        assert torch.equal(linear.weight, before)


@pytest.mark.usefixtures("able")
def test_a_layer_that_torchao_leaves_alone_is_said_so() -> None:
    with pytest.raises(ValueError, match=r"leaves a weight of shape \(30, 64\) as it is with float8_dynamic"):
        torchao.TorchaoLinear(nn.Linear(64, 30, dtype=torch.bfloat16), "float8_dynamic", compiled=False)


@pytest.mark.usefixtures("able")
def test_too_few_rows_are_filled_up() -> None:
    """torch._int_mm takes more than 16 rows; a scale per token keeps rows apart."""
    layer = torchao.TorchaoLinear(nn.Linear(64, 32, dtype=torch.bfloat16), "int8_dynamic", compiled=False)
    seen, product = list[int](), layer.product

    def noted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x.shape[-2])
        return product(x, *rest)

    layer.product = noted
    given = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    expected = layer(given)
    layer.rows = torchao.SCHEMES["int8_dynamic"].rows
    assert torch.equal(layer(given), expected)
    assert seen == [3, 17]


@pytest.mark.parametrize(("on", "descent"), [("cpu", None), ("cuda", True)])
def test_products_compiled_for_a_gpu_are_tuned_for_one_row(
    on: str, descent: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without coordinate descent inductor widens 8-bit weights in memory, five bytes a weight instead of one."""
    given = dict[str, Any]()
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.update(options) or function)
    torchao._compiled.__wrapped__("int8_weight_only", (64, 64), True, on)
    assert given["options"].get("coordinate_descent_tuning") is descent
    given.clear()
    model = models.tiny("llama")
    token: Any = SimpleNamespace(device=torch.device(on), shape=(1, 1))
    with pytest.raises(TransformError, match="does not compile"):
        compiled.compile_ahead((model, token), regions=False)  # the function that is not compiled cannot be kept
    assert given["options"].get("coordinate_descent_tuning") is descent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", ["bfloat16", "float16"])
def test_tensor_cores_gain_nothing_from_another_half(dtype: torch.dtype, wanted: str) -> None:
    variant = Variant(models.tiny("llama").to(dtype))
    assert "at one rate" in (make("linear_dtype", {"dtype": wanted}, "both").unavailable(variant, gpu("9.0")) or "")


def test_a_sample_that_does_not_fit_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    transform: Any = make("torchao", {"scheme": "int8_weight_only"}, "decode")

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB")

    monkeypatch.setattr(torchao, "quantized", out_of_memory)
    assert transform.extra_bytes(Variant(models.tiny("llama"))) == 0.0


@pytest.mark.parametrize(
    ("scheme", "inputs", "outputs", "taken"),
    [
        ("int8_dynamic", 64, 50257, False),  # GPT-2's vocabulary: torchao would multiply it on the host
        ("int8_dynamic", 64, 50264, True),
        ("float8_dynamic", 72, 64, False),
        ("int4_weight_only", 48, 64, False),
        ("int4_weight_only", 64, 50257, True),
        ("int8_weight_only", 48, 50257, True),
    ],
)
def test_layers_that_do_not_fit_are_left(
    scheme: str, inputs: int, outputs: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchao, "TorchaoLinear", lambda linear, scheme, compiled: "exchanged")
    linear = nn.Linear(inputs, outputs, device="meta")  # any device but a CPU counts as a GPU
    assert make("torchao", {"scheme": scheme}).exchange(linear) == ("exchanged" if taken else None)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("scheme", "capturable"), [("int8", False), ("int8_vectorwise", True), ("nf4", True), ("fp4", True)]
)
def test_what_waits_for_the_device_is_not_captured(scheme: str, capturable: bool) -> None:
    transform, variant = make("bitsandbytes", {"scheme": scheme}, "decode"), Variant(models.tiny("llama").bfloat16())
    with devices.stand_in(FakeCuda()):
        if (reason := transform.unavailable(variant, gpu("9.0"))) is not None:
            pytest.skip(reason)
        candidate = variant.with_transform(transform)
        assert candidate.modules["decode"].lm_head.capturable == capturable
        reason = uncapturable(candidate)
        if capturable:
            assert reason is None
            return
        assert "layers in LLM.int8 wait for the device at every call" in (reason or "")
        with pytest.raises(TransformError, match=r"LLM\.int8 wait"):
            candidate.with_transform(make("cuda_graph", {}, "decode"))


@pytest.mark.parametrize(
    "transforms",
    [
        [("merged_linears", {}, "decode"), ("torchao", {"scheme": "int8_weight_only", "compile": False}, "decode")],
        [("linear_dtype", {}, "both"), ("bitsandbytes", {"scheme": "nf4"}, "decode")],
        [("torchao", {"scheme": "float8_weight_only", "compile": False}, "both")],
        [("bitsandbytes", {"scheme": "int8_vectorwise"}, "decode")],
    ],
    ids=lambda each: "+".join(name for name, *_ in each),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_narrow_weights_in_captured_steps(transforms: list[Any], dtype: torch.dtype) -> None:
    """The path of a GPU as a whole on one that is not there: the same tokens captured as uncaptured."""
    ids = torch.tensor(models.token_prompts(1, 20))
    with devices.stand_in(FakeCuda()):
        variant = Variant(models.tiny("llama").to(dtype))
        for transform in (make(*each) for each in transforms):
            reason = transform.unavailable(variant, gpu("9.0"))
            if transform.name == "linear_dtype" and dtype == torch.bfloat16:
                assert "already" in (reason or "")
                continue
            assert reason is None
            variant = variant.with_transform(transform)
            assert transform.took_effect(variant) is None
        captured = variant.with_transform(make("cuda_graph", {}, "decode"))
        plain = variant.with_transform(make("static_cache", {}, "decode"))
        got, expected = (serving(v).generate(ids, max_new_tokens=8, min_new_tokens=8) for v in (captured, plain))
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "scheme", "error"),
    [
        *[("torchao", scheme, 0.06 if "float8" in scheme else 0.02) for scheme in torchao.SCHEMES if "4" not in scheme],
        ("torchao", "int4_weight_only", 0.15),
        ("torchao", "int4_hqq", 0.15),
        *[("bitsandbytes", scheme, 0.02 if "int8" in scheme else 0.15) for scheme in bitsandbytes.BITS],
    ],
)
def test_numbers_on_a_gpu(name: str, scheme: str, error: float, dtype: torch.dtype) -> None:
    from autotune.machine import hardware

    torch.manual_seed(0)
    model = models.tiny("llama", hidden_size=256, intermediate_size=512).to("cuda", dtype)
    transform = make(name, {"scheme": scheme}, "decode")
    if (reason := transform.unavailable(Variant(model), hardware.probe(model))) is not None:
        pytest.skip(reason)
    linear = model.model.layers[0].mlp.up_proj
    layer = transform.exchange(linear)  # type: ignore[attr-defined]
    for rows in (1, 8, 64):
        x = torch.randn(1, rows, 256, device="cuda", dtype=dtype)
        expected, got = linear(x).float(), layer(x).float()
        assert (got - expected).norm() <= error * expected.norm()
