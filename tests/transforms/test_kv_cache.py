"""KV caches in narrow numbers: what they hold, what they cost, and that the gate sees what they spoil."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from autotune.diagnose.costs import PhaseProfile, Profile
from autotune.diagnose.work import Forward, cache_size
from autotune.errors import ChoiceError, TransformError
from autotune.machine import device
from autotune.model import seam
from autotune.profile.survey import memory_use
from autotune.runtime.cache import narrow as kv
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.transforms import make
from autotune.transforms.offloaded_cache import OffloadedCache
from autotune.transforms.quantised_cache import QuantisedCache
from autotune.transforms.static_cache import StaticCache
from autotune.validate import Verdict
from autotune.validate.quality import Exam, judge
from tests.fakes.cuda import FakeCuda
from tests.models import left_padded, tiny, token_prompts
from tests.runtime.test_loop import ask, same
from tests.transforms.test_contract import COMPILER

GPU = replace(COMPILER, device="cuda", capability="9.0", compiler=None)
SCHEMES = ["int8", "fp8", "int4"]
ERROR = {"int8": 0.01, "fp8": 0.04, "int4": 0.12}  # of a normal distribution's deviation: step / sqrt(12), with room
LONG = torch.tensor([token_prompts(1, length=60)[0]])
WIDE = {"head_dim": 32}  # INT4 stores groups of 32


def held(arch: str, scheme: str, **changes: Any) -> tuple[Any, Variant]:
    model = tiny(arch, **changes)
    return model, Variant(model).with_transforms([QuantisedCache("decode", scheme)])


# Numbers


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_is_near_what_was_given(scheme: Any) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 3, 17, 64)
    parts = kv.encode(states, scheme)
    assert sum(p.numel() * p.element_size() for p in parts) == 2 * 3 * 17 * kv.bytes_per_head(64, scheme)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        error = kv.decode(parts, dtype).float() - states
        assert error.pow(2).mean().sqrt() < ERROR[scheme]
        assert kv.decode(parts, dtype).dtype is dtype


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "value", [0.0, 1e-30, 1e4, -3.0], ids=["zeros", "next to nothing", "large", "all the same, negative"]
)
def test_odd_numbers_are_kept(scheme: Any, value: float) -> None:
    states = torch.full((1, 1, 2, 32), value)
    assert torch.allclose(kv.decode(kv.encode(states, scheme), torch.float32), states, rtol=0.07, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_outlier_spoils_nothing_but_its_own_token(scheme: Any) -> None:
    torch.manual_seed(0)
    states, others = torch.randn(1, 1, 8, 64), torch.arange(8) != 3
    before = kv.decode(kv.encode(states, scheme), torch.float32)
    states[0, 0, 3, 5] = 500.0
    after = kv.decode(kv.encode(states, scheme), torch.float32)
    assert torch.equal(before[:, :, others], after[:, :, others])
    assert after[0, 0, 3, 5] == pytest.approx(500, rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_store_grows_and_keeps_what_it_has(scheme: Any) -> None:
    torch.manual_seed(0)
    store, whole = kv.NarrowStore(scheme), torch.randn(2, 3, 2 * kv.GROWTH + 9, 32)
    store.append(whole[:, :, :5])
    before = store.read(torch.float32)
    for start in range(5, whole.shape[2], 100):
        store.append(whole[:, :, start : start + 100])
    assert store.length == whole.shape[2]
    assert torch.equal(store.read(torch.float32)[:, :, :5], before)
    assert torch.equal(store.read(torch.float32), kv.decode(kv.encode(whole, scheme), torch.float32))
    assert store.size_bytes == 2 * 3 * 3 * kv.GROWTH * kv.bytes_per_head(32, scheme)


# Answers


@pytest.mark.parametrize("where", ["CPU", "fake GPU"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_answers_are_near_the_originals(arch: str, scheme: str, where: str) -> None:
    model, variant = held(arch, scheme, initializer_range=0.1, **WIDE)
    asked = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 3}
    served = serving(variant)
    with device.stand_in(FakeCuda() if where == "fake GPU" else device.of("cpu")):
        mine = ask(served, LONG, **asked)
    theirs = ask(model, LONG, **asked)
    assert torch.equal(mine.logits[0], theirs.logits[0]), "the prompt is read before anything is stored"
    # the first token after it sees 60 stored ones
    error = (mine.logits[1] - theirs.logits[1]).norm() / theirs.logits[1].norm()
    assert 0 < error < {"int8": 0.03, "fp8": 0.12, "int4": 0.4}[scheme]


def test_a_padded_batch_is_served() -> None:
    model, variant = held("gpt2", "int8")
    padded = left_padded()
    ids, mask = padded["input_ids"], padded["attention_mask"]
    mine = ask(serving(variant), ids, attention_mask=mask, max_new_tokens=2)
    same(mine, ask(model, ids, attention_mask=mask, max_new_tokens=2))


def test_the_caller_is_given_a_plain_cache() -> None:
    model, variant = held("gemma3", "int8")
    first = ask(serving(variant), LONG, return_dict_in_generate=True)
    assert type(seam.cache_in(first)) is DynamicCache
    assert seam.cache_in(first).get_seq_length() == first.sequences.shape[1] - 1
    plain = seam.cache_in(ask(model, LONG, return_dict_in_generate=True))
    full = seam.cache_in(first).layers[1].keys[:, :, :60], plain.layers[1].keys[:, :, :60]
    assert 0 < (full[0] - full[1]).abs().max() < 0.02 * full[1].abs().max()
    assert seam.cache_in(first).layers[0].keys.shape == plain.layers[0].keys.shape  # the sliding window's
    longer = torch.cat([first.sequences, LONG[:, :3]], dim=1)
    assert ask(model, longer, **seam.over(model, seam.cache_in(first))).shape[1] == longer.shape[1] + 12


# Memory


@pytest.mark.parametrize(("scheme", "share"), [("int8", 36 / 128), ("fp8", 36 / 128), ("int4", 20 / 128)])
def test_memory_counts_what_is_held(scheme: str, share: float) -> None:
    model, variant = held("llama", scheme, **WIDE)  # float32: a head of 32 takes 128 bytes
    plain, narrow = (memory_use(v, Forward(2, 30), 10).cache_bytes for v in (Variant(model), variant))
    assert plain == 2 * 40 * 2 * 2 * 2 * 32 * 4  # sequences, tokens, keys and values, layers, heads, head size, bytes
    assert narrow == plain * share
    assert variant.kv is not None
    cache: Any = variant.kv.make(model.config)
    with torch.no_grad():
        model(torch.tensor(token_prompts(2, length=kv.GROWTH // 2)).repeat(1, 2), **seam.over(model, cache))
    stored = sum(store.size_bytes for layer in cache.layers for store in layer.stores)
    assert stored == variant.kv.bytes(model, 2, kv.GROWTH, 4)


def test_sliding_windows_are_left_as_they_are() -> None:
    model = tiny("gemma3")  # a layer with a window of 8, one without
    windowed = cache_size(model, 1, 100, 4) - 100 * 2 * 2 * 16 * 4
    assert kv.KvCache("int8").bytes(model, 1, 100, 4) == windowed + 100 * 2 * 2 * (16 + 4)
    assert kv.KvCache("offloaded").bytes(model, 1, 100, 4) == cache_size(model, 1, 100, 4)  # two layers are in flight
    deep = tiny("llama", num_hidden_layers=6)
    assert kv.KvCache("offloaded").bytes(deep, 1, 100, 4) * 3 == cache_size(deep, 1, 100, 4)


# Quality


class Fading(kv.NarrowStore):
    """Loses a little of everything it holds with every token that is added, the more it holds."""

    def append(self, states: torch.Tensor) -> None:
        super().append(states)
        _, scale = self._parts
        scale[:, :, : self.length] *= 1 - 0.05 * max(0, self.length - 200) / 300


@pytest.fixture(scope="module")
def exam() -> tuple[Any, Any]:
    model = tiny("llama", max_position_embeddings=1024, initializer_range=0.15)
    prompts = token_prompts(20, length=48, seed=3)
    return model, Exam.prepare(model, prompts, pad_token_id=0)


def test_the_gate_admits_int8(exam: tuple[Any, Any]) -> None:
    model, questions = exam
    assert (
        judge(questions, Variant(model).with_transforms([QuantisedCache("decode", "int8")]), "strict").verdict
        is Verdict.PASS
    )


def test_the_gate_sees_an_error_that_grows_with_the_context(
    exam: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored up to 80 tokens the cache is as good as INT8 is; after 256 and 512 it is not."""
    model, questions = exam
    monkeypatch.setattr(kv, "NarrowStore", Fading)
    found = judge(questions, Variant(model).with_transforms([QuantisedCache("decode", "int8")]), "strict")
    assert found.verdict is Verdict.FAIL
    assert "long" in found.reason, found.reason


# What is refused


@pytest.mark.parametrize(
    ("arch", "params", "says"),
    [
        ("llama", {"scheme": "int8"}, None),
        ("llama", {"scheme": "fp8"}, None),
        ("llama", {"scheme": "int4"}, "groups of 32 numbers, and heads have 16"),
        ("llama", {"scheme": "int4", "backend": "quanto"}, "pip install optimum-quanto"),
        ("llama", {"scheme": "int4", "backend": "hqq"}, "pip install hqq"),
        ("mistral-window", {}, "every layer has a sliding window"),
        ("mamba", {}, "position_ids"),
    ],
)
def test_unavailable(arch: str, params: dict[str, Any], says: str | None) -> None:
    reason = make("quantised_cache", params, "decode").unavailable(Variant(tiny(arch)), COMPILER)
    assert reason is None if says is None else says in (reason or "")


def test_libraries_take_full_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.transforms.quantised_cache._missing", lambda module: False)
    for backend in ("quanto", "hqq"):
        transform = QuantisedCache("decode", "int4", backend)
        assert transform.unavailable(Variant(tiny("llama")), COMPILER) is None
        assert "sliding_attention" in (transform.unavailable(Variant(tiny("gemma3")), COMPILER) or "")
        assert transform.took_effect(Variant(tiny("llama")).with_transforms([transform])) is None


def test_only_a_gpu_has_something_to_offload() -> None:
    variant = Variant(tiny())
    assert "host's own memory" in (OffloadedCache("decode").unavailable(variant, COMPILER) or "")
    assert OffloadedCache("decode").unavailable(variant, GPU) is None
    assert OffloadedCache("decode").took_effect(Variant(tiny()).with_transforms([OffloadedCache("decode")])) is None


@pytest.mark.parametrize(
    "params",
    [{"scheme": "int2"}, {"backend": "nonsense"}, {"scheme": "int8", "backend": "quanto"}],
    ids=str,
)
def test_parameters_that_make_no_sense(params: dict[str, Any]) -> None:
    with pytest.raises(ChoiceError, match="quantised_cache"):
        make("quantised_cache", params, "decode")
    with pytest.raises(ChoiceError, match="prefill has no cache"):
        make("quantised_cache", {}, "prefill")
    with pytest.raises(ChoiceError, match="prefill has no cache"):
        make("offloaded_cache", {}, "prefill")


def test_a_cache_is_of_one_kind() -> None:
    model = tiny("llama")
    narrow, static = (
        Variant(model).with_transforms([QuantisedCache("decode")]),
        Variant(model).with_transforms([StaticCache()]),
    )
    assert "stored in int8 already" in (OffloadedCache("decode").unavailable(narrow, GPU) or "")
    assert "static" in (QuantisedCache("decode").unavailable(static, COMPILER) or "")
    assert make("step_program", {}, "decode").unavailable(narrow, COMPILER) == f"the KV cache is {narrow.kv}"
    with pytest.raises(TransformError, match="stored in int8"):
        narrow.with_transform(StaticCache())


def test_it_promises_memory_and_no_time() -> None:
    decode = PhaseProfile("decode", (0.01,), 1e9, 1e9, 3.2e9, 0.9, "float16", 0.005, 0.005, 100, 0.0, ())
    profile = Profile({"decode": decode}, (), (), None, 100, 1)
    assert QuantisedCache("decode").predict(profile, GPU) == {"decode": 1.0}
    assert OffloadedCache("decode").predict(profile, GPU) == {"decode": pytest.approx(0.01 / 0.05)}  # 3.2 GB at 64 GB/s


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_narrow_caches_on_a_gpu_hold_what_they_hold_on_a_cpu(scheme: Any) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 3, 17, 64)
    here, there = (kv.decode(kv.encode(s, scheme), torch.float32) for s in (states, states.cuda()))
    torch.testing.assert_close(there.cpu(), here, atol=1e-2, rtol=7e-2)


@pytest.mark.gpu
def test_an_offloaded_cache_answers_as_a_resident_one_does() -> None:
    model = tiny("llama").to("cuda")
    ids = LONG.cuda()
    served = serving(Variant(model).with_transforms([OffloadedCache("decode")]))
    same(ask(served, ids), ask(model, ids))
