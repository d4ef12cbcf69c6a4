"""Another attention implementation, for the twin alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from autotune.errors import TransformError
from autotune.machine import device
from autotune.model.seam import attentions_of as in_use
from autotune.runtime import attention_sdpa
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.transforms import attention, make
from autotune.transforms.attention import IMPLEMENTATIONS, Attention, operators
from tests import models
from tests.fakes.cuda import FakeCuda
from tests.transforms.test_contract import COMPILER

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def test_changes_one_phase(llama: PreTrainedModel) -> None:
    candidate = Variant(llama).with_transform(Attention("prefill", "eager"))
    assert in_use(candidate.modules["prefill"]) == {"eager"}
    assert candidate.modules["decode"] is llama
    assert in_use(llama) == {"sdpa"}
    ids = torch.tensor(models.token_prompts())
    with torch.no_grad():
        torch.testing.assert_close(candidate.modules["prefill"](ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "implementation", "says"),
    [
        ("llama", "sdpa", "sdpa is in use for"),
        ("llama", "flash_attention_2", "needs a CUDA device"),
        ("mamba", "sdpa", "does not support sdpa"),
        ("llama", "eager", None),
        ("gpt2", "eager", None),
    ],
)
def test_unavailable(architecture: str, implementation: str, says: str | None) -> None:
    reason = Attention("both", implementation).unavailable(Variant(models.tiny(architecture)), COMPILER)
    assert reason is None if says is None else says in (reason or "")


def test_a_refusal_is_a_transform_error(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PreTrainedModel, implementation: str) -> None:
        self.config._attn_implementation_internal = implementation
        raise ValueError("not today")

    monkeypatch.setattr(type(llama), "set_attn_implementation", refuse)
    with pytest.raises(TransformError, match="not today"):
        Variant(llama).with_transform(Attention("both", "eager"))
    assert in_use(llama) == {"sdpa"}


def test_took_effect_sees_another_implementation(llama: PreTrainedModel) -> None:
    transform = Attention("decode", "eager")
    candidate = Variant(llama).with_transform(transform)
    assert transform.took_effect(candidate) is None
    candidate.modules["decode"].set_attn_implementation("sdpa")
    assert transform.took_effect(candidate) == "decode uses sdpa instead of eager"


GPU = replace(COMPILER, device="cuda", name="a GPU")
HALF = {"dtype": torch.bfloat16}
HUB = "kernels-community/flash-attn2"


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    attention._missing.cache_clear()
    yield
    attention._missing.cache_clear()


@pytest.mark.parametrize(
    ("implementation", "capability", "dtype", "changes", "says"),
    [
        ("sdpa:flash", "9.0", torch.bfloat16, {}, None),
        ("sdpa:flash", "12.0", torch.float16, {}, None),
        ("sdpa:flash", "7.5", torch.bfloat16, {}, "needs compute capability 8.0 or later; this GPU is turing (7.5)"),
        ("sdpa:flash", "9.0", torch.float32, {}, "takes FP16 and BF16; between this model's layers it is torch.float"),
        ("sdpa:flash", "9.0", torch.bfloat16, {"head_dim": 512}, "heads of up to 256 numbers; this model's have 512"),
        ("sdpa:cudnn", "8.9", torch.bfloat16, {}, None),
        ("sdpa:cudnn", "8.9", torch.bfloat16, {"head_dim": 256}, "heads of up to 128"),
        ("sdpa:efficient", "7.0", torch.float32, {}, None),
        ("sdpa:math", "7.0", torch.float32, {}, None),
        ("flash_attention_2", "8.0", torch.bfloat16, {}, "package flash_attn is not installed"),
        (
            "flash_attention_3",
            "8.9",
            torch.bfloat16,
            {},
            "needs compute capability 9.0 or later; this GPU is ada",
        ),
        ("flash_attention_3", "9.0", torch.bfloat16, {}, "package flash_attn_interface is not installed"),
        ("flash_attention_3", "10.0", torch.bfloat16, {}, "no kernels for blackwell (10.0), only up to hopper (9.9)"),
        ("flash_attention_4", "10.0", torch.bfloat16, {}, "package flash_attn.cute is not installed"),
        (HUB, "8.6", torch.bfloat16, {}, "package kernels is not installed"),
        ("flex_attention", "8.0", torch.float32, {}, "package triton is not installed"),
    ],
)
def test_what_a_gpu_and_a_model_must_have(
    implementation: str,
    capability: str,
    dtype: torch.dtype,
    changes: dict[str, Any],
    says: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = (IMPLEMENTATIONS[implementation].package or "none").partition(".")[0]
    monkeypatch.setitem(sys.modules, package, None)
    model = models.tiny("llama", **changes).to(dtype)
    reason = Attention("prefill", implementation).unavailable(Variant(model), replace(GPU, capability=capability))
    assert reason is None if says is None else says in (reason or "")


def test_a_package_that_raises_on_import(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol: _ZN3c105Error')")
    monkeypatch.syspath_prepend(tmp_path)
    hopper = replace(GPU, capability="9.0")
    reason = Attention("prefill", "flash_attention_2").unavailable(Variant(llama.bfloat16()), hopper)
    assert "cannot be imported: OSError: undefined symbol" in (reason or "")


def test_a_package_that_transformers_does_not_take(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It would fetch a kernel of the hub instead."""
    (tmp_path / "flash_attn.py").write_text("__version__ = '1.0'")
    monkeypatch.syspath_prepend(tmp_path)
    hopper = replace(GPU, capability="9.0")
    reason = Attention("prefill", "flash_attention_2").unavailable(Variant(llama.bfloat16()), hopper)
    assert "does not accept the installed package" in (reason or "")
    sys.modules.pop("flash_attn")


def test_flash_and_the_mask_of_a_static_cache(llama: PreTrainedModel) -> None:
    variant = Variant(llama.bfloat16())
    hopper = replace(GPU, capability="9.0")
    assert Attention("decode", "sdpa:flash").unavailable(variant, hopper) is None
    variant.caches = object()  # type: ignore[assignment]
    assert "takes no mask" in (Attention("decode", "sdpa:flash").unavailable(variant, hopper) or "")
    assert (
        Attention("decode", "sdpa:flash").unavailable(variant, replace(hopper, device="cpu")) is None
    )  # its own takes one
    assert Attention("prefill", "sdpa:flash").unavailable(variant, hopper) is None
    assert Attention("decode", "sdpa:cudnn").unavailable(variant, hopper) is None


@pytest.mark.parametrize(
    ("fetched", "offline", "allowed", "says"),
    [
        (False, "1", "", "is not in the local cache"),
        (False, "", "1", None),
        (True, "", "", "set HF_HUB_OFFLINE=1"),
        (True, "1", "", None),
    ],
)
def test_nothing_is_downloaded_unasked(
    fetched: bool, offline: str, allowed: str, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fetched:
        (tmp_path / "kernels--kernels-community--flash-attn2" / "snapshots" / "0123").mkdir(parents=True)
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("AUTOTUNE_ALLOW_DOWNLOADS", allowed)
    reason = attention._not_fetched(HUB)
    assert reason is None if says is None else says in (reason or "")


def switches() -> list[bool]:
    cuda = torch.backends.cuda
    return [
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    ]


@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral-window", "gemma3"])
def test_a_chosen_kernel_computes_the_same(backend: str, architecture: str) -> None:
    model, before = models.tiny(architecture), switches()
    transform = Attention("both", f"sdpa:{backend}")
    candidate = Variant(model).with_transform(transform)
    assert transform.took_effect(candidate) is None
    for inputs in (models.left_padded(), {"input_ids": torch.tensor(models.token_prompts(2, 20))}):
        for variant in (candidate, candidate.with_transform(make("lean_loop", {}, "decode"))):
            got = serving(variant).generate(**inputs, max_new_tokens=12, min_new_tokens=12)
            assert torch.equal(got, model.generate(**inputs, max_new_tokens=12, min_new_tokens=12))
    assert switches() == before


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", attention_sdpa.KERNELS)
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "size"), [(8, 16, 16, 64), (2, 16, 16, 60), (2, 1, 33, 128), (2, 1, 1, 64)]
)
def test_shapes_on_a_gpu(backend: str, heads: int, queries: int, keys: int, size: int, masked: bool) -> None:
    """Torch's own description of the CUDA operators, for meta tensors; what their kernels refuse goes to SDPA."""
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    query, key = torch.empty(1, 8, queries, size, **half), torch.empty(1, heads, keys, size, **half)
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device="meta") if masked else None
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 8 // heads
    with FakeCuda().kernels():
        out, _ = attention_sdpa.attend(backend, module, query, key, key, mask, scaling=0.1)
    assert out.shape == (1, queries, 8, size)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()


@pytest.mark.parametrize("backend", attention_sdpa.ON_CPU)
@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_one_kernel_against_sdpa(backend: str, mask: str | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    given = torch.rand(2, 1, 5, 9) > 0.3
    given[..., 0] = True
    bias = {None: None, "boolean": given, "additive": torch.where(given, 0.0, float("-inf"))}[mask]
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    out, _ = attention_sdpa.attend(backend, module, query, key, value, bias, is_causal=False)
    wide = (t.repeat_interleave(2, 1) for t in (key, value))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, *wide, attn_mask=bias).transpose(1, 2))


@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_share_a_key_take_the_place_of_queries(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step repeats no keys, even for a kernel that does not know grouped heads."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask = torch.rand(2, 1, 1, 9) > 0.3 if masked else None
    seen = list[tuple[int, ...]]()

    def compute(q: Any, k: Any, v: Any, *rest: Any) -> torch.Tensor:
        seen.extend(tuple(t.shape) for t in (q, k, v))
        return attention_sdpa._math(q, k, v, *rest)

    kernel = replace(attention_sdpa.KERNELS["efficient"], compute=compute)
    monkeypatch.setitem(attention_sdpa.ON_CPU, "efficient", kernel)
    module: Any = torch.nn.Module()
    out, _ = attention_sdpa.attend("efficient", module, query, key, value, mask)
    assert seen == [(2, 2, 4, 16), (2, 2, 9, 16), (2, 2, 9, 16)]
    wide = (t.repeat_interleave(4, 1) for t in (key, value))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, *wide, attn_mask=mask).transpose(1, 2))


@pytest.mark.parametrize("name", ["flash_attention_2", "sdpa:flash"])
def test_what_takes_no_mask_does_not_decode_over_slots(
    name: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: SDPA would compute in its place without a word, flash-attn would wait or raise."""
    monkeypatch.setattr(attention_sdpa, "ON_CPU", {})
    hopper = replace(GPU, capability="9.0")
    with device.stand_in(FakeCuda()):
        variant = Variant(llama.bfloat16()).with_transform(Attention("decode", "sdpa:math"))
        used = attention_sdpa.register("flash") if ":" in name else name
        for module in variant.modules["decode"].modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = used
        for transform in (make(slots, {}, "decode") for slots in ("static_cache", "cuda_graph", "compile_step")):
            assert f"attention is {name}, which takes no mask" in (transform.unavailable(variant, hopper) or "")
            with pytest.raises(TransformError, match="takes no mask"):
                transform.apply(variant)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_another_kernel_than_the_chosen_one_is_no_effect(
    phase: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = Attention(phase, "sdpa:math")
    candidate = Variant(llama).with_transform(transform)
    assert transform.took_effect(candidate) is None
    monkeypatch.setattr(attention_sdpa, "kernel", lambda backend, device: None)  # every call goes to SDPA's own choice
    assert transform.took_effect(candidate) == (
        f"{phase} computes attention by _scaled_dot_product_flash_attention_for_cpu instead of sdpa:math"
    )


@pytest.mark.parametrize(
    ("implementation", "seen", "by"),
    [
        ("flash_attention_2", {"_flash_attn_forward", "mm"}, None),
        ("flash_attention_2", {"mm"}, None),  # a package may call its kernels past the dispatcher
        ("flash_attention_2", {"_softmax", "bmm"}, "_softmax"),
        (HUB, {"_scaled_dot_product_cudnn_attention"}, "_scaled_dot_product_cudnn_attention"),
        ("sdpa:cudnn", {"_scaled_dot_product_cudnn_attention"}, None),
        ("sdpa:cudnn", {"_scaled_dot_product_efficient_attention"}, "_scaled_dot_product_efficient_attention"),
        ("sdpa:flash", {"_safe_softmax"}, "_safe_softmax"),
        ("sdpa:flash", {"mm"}, "no kernel of SDPA's"),
    ],
)
def test_what_a_trace_of_a_gpu_shows(implementation: str, seen: set[str], by: str | None) -> None:
    assert Attention("prefill", implementation)._elsewhere(seen, torch.device("cuda")) == by


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:_compile flag on create")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_flex_attention_uncompiled(phase: str, llama: PreTrainedModel) -> None:
    """What transformers makes of it; the kernels themselves are generated for a GPU."""
    assert "needs a CUDA device" in (Attention(phase, "flex_attention").unavailable(Variant(llama), COMPILER) or "")
    with torch.compiler.set_stance("force_eager"):
        transform = Attention(phase, "flex_attention")
        candidate = Variant(llama).with_transform(transform)
        assert transform.took_effect(candidate) is None
        for inputs in (models.left_padded(), {"input_ids": torch.tensor(models.token_prompts(2, 20))}):
            got = serving(candidate).generate(**inputs, max_new_tokens=6, min_new_tokens=6)
            assert torch.equal(got, llama.generate(**inputs, max_new_tokens=6, min_new_tokens=6))
        if phase == "decode":  # FlexAttention adds a mask of four dimensions, also one of true and false
            slots = candidate.with_transform(make("static_cache", {}, "decode"))
            got = serving(slots).generate(**inputs, max_new_tokens=6, min_new_tokens=6)
            assert torch.equal(got, llama.generate(**inputs, max_new_tokens=6, min_new_tokens=6))


def test_operators_are_those_of_the_phase(llama: PreTrainedModel) -> None:
    assert "_scaled_dot_product_flash_attention_for_cpu" in operators(llama, "prefill")
    llama.set_attn_implementation("eager")
    assert "_softmax" in operators(llama, "decode")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", attention_sdpa.KERNELS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_chosen_kernel_on_a_gpu(backend: str, phase: str) -> None:
    from autotune.machine import hardware

    model = models.tiny("llama", hidden_size=256).to("cuda", torch.bfloat16)
    transform, variant = Attention(phase, f"sdpa:{backend}"), Variant(model)
    if (reason := transform.unavailable(variant, hardware.probe(model))) is not None:
        pytest.skip(reason)
    candidate = variant.with_transform(transform)
    assert transform.took_effect(candidate) is None
    ids = torch.tensor(models.token_prompts(2, 20), device="cuda")
    with torch.no_grad():
        got, expected = candidate.modules[phase](ids).logits.float(), model(ids).logits.float()
    assert (got - expected).norm() < 0.03 * expected.norm()
