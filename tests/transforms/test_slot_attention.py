"""Attention over slots without a mask: what each query sees, its numbers against SDPA's, and the original's tokens.

The kernel is numpy's (`tests.fakes.varlen`); it checks the arguments, and that nothing is read beyond the cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import ChoiceError, MeasurementError, VariantError
from autotune.machine import device
from autotune.machine.hardware import Hardware
from autotune.model import route, seam
from autotune.runtime import attention_slots
from autotune.runtime.cache import slot_forward
from autotune.runtime.cache.slots import SlotCache
from autotune.runtime.dispatch import serving
from autotune.runtime.speculation.pace import evenly
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.attention import Attention
from autotune.transforms.continuous_batching import ContinuousBatching
from autotune.transforms.cuda_graph import CudaGraph
from autotune.transforms.slot_attention import SlotAttention
from autotune.transforms.speculation import Speculation
from autotune.transforms.static_cache import StaticCache
from autotune.workload import Workload
from tests.architectures import Fallback
from tests.fakes import varlen
from tests.fakes.cuda import FakeCuda
from tests.models import left_padded, tiny, token_prompts
from tests.runtime.test_batching import Round

CUDA = Hardware("cuda", "test", "9.0", 1, 2**36, 3e12, {"bfloat16": 9e14}, None, {})
OURS = SlotAttention("decode")
EAGER, GRAPH = StaticCache("decode", slots=128), CudaGraph("decode", shortest=16, slots=128)
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt-neox", "mistral-window", "mixtral"]
PROMPTS = [torch.tensor([prompt]) for prompt in token_prompts(3, length=11)]


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    fake = FakeCuda(without=("varlen",))  # which refuses FP32, in which a tiny model's tokens are sure
    with device.stand_in(fake), varlen.kernel():
        yield fake


def made(model: Any, *transforms: Transform) -> Variant:
    work = Workload(tuple(map(tuple, token_prompts(4))), 12, (1, 3))
    return Variant(model, workload=work).with_transforms([OURS, *transforms])


def ask(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return model.generate(ids, **({"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0} | options))


KEYS = torch.empty(3, 2, 16, 8)  # rows are 32 slots apart


@pytest.mark.parametrize(
    ("last", "padding", "window", "begin", "seen"),
    [
        ([[4]], [[0], [0], [0]], None, [0, 32, 64], [5, 5, 5]),
        ([[4]], [[0], [3], [1]], None, [0, 35, 65], [5, 2, 4]),
        ([[4]], [[0], [3], [1]], 3, [2, 35, 66], [3, 2, 3]),
        ([[4, 5]], [[0], [3], [1]], None, [0, 0, 35, 35, 65, 65], [5, 6, 2, 3, 4, 5]),
        ([[4, 5]], [[0], [5], [1]], 3, [2, 3, 37, 37, 66, 67], [3, 3, 0, 1, 3, 3]),
        ([[9], [0], [2]], [[0], [16], [0]], None, [0, 48, 64], [10, 0, 3]),  # the second row has no sequence
        ([[9], [0], [2]], [[0], [16], [0]], 4, [6, 48, 64], [4, 0, 3]),
    ],
)
def test_what_each_query_sees(last: Any, padding: Any, window: int | None, begin: list[int], seen: list[int]) -> None:
    found = attention_slots.spans(torch.tensor(last), torch.tensor(padding), window, KEYS)
    assert found.shape == (3, 1, 1, len(seen) + 1)
    assert found.dtype == torch.int32
    order, begins, lengths = (row.flatten().tolist() for row in found)
    assert order == list(range(len(seen) + 1))
    assert (begins[:-1], lengths[:-1]) == (begin, seen)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(1, 3),
    read=st.integers(8, 24),
    window=st.none() | st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_numbers_against_sdpa(rows: int, kv_heads: int, queries: int, read: int, window: int | None, seed: int) -> None:
    """Over a view of some of the slots of a larger cache, whose other slots hold NaN."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.full((rows, kv_heads, 24, 8), float("nan"))[:, :, :read] for _ in range(2))
    for held in (keys, values):
        held.copy_(torch.randn(held.shape, generator=draw))
    query = torch.randn(rows, 4, queries, 8, generator=draw)
    slot = int(torch.randint(0, read - queries + 1, (), generator=draw))
    last = torch.arange(slot, slot + queries)
    padding = torch.randint(0, slot + 1, (rows, 1), generator=draw)
    index = torch.arange(read)
    mask = (index <= last[:, None]) & (index >= padding[:, :, None])  # [rows, queries, read]
    if window is not None:
        mask &= index > last[:, None] - window
    wide = (held.repeat_interleave(4 // kv_heads, 1) for held in (keys, values))
    expected = F.scaled_dot_product_attention(query, *wide, attn_mask=mask[:, None], scale=0.3).transpose(1, 2)
    spans = attention_slots.spans(last[None], padding, window, keys)
    with varlen.kernel():
        got, _ = attention_slots.attend(torch.nn.Module(), query, keys, values, spans, scaling=0.3)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("chain", [[EAGER], [GRAPH]], ids=["eager", "graphs"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_original_s_tokens(arch: str, chain: list[Transform], fake: FakeCuda) -> None:
    """One sequence beyond the windows, three, and three that are padded."""
    model = tiny(arch)
    variant = made(model, *chain)
    assert OURS.took_effect(variant) is None
    replays = fake.replays
    for inputs in ({"ids": PROMPTS[0]}, {"ids": torch.cat(PROMPTS)}):
        assert torch.equal(ask(serving(variant), **inputs), ask(model, **inputs))
    padded = left_padded()
    given = {"ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
    assert torch.equal(ask(serving(variant), **given), ask(model, **given))
    assert (fake.replays > replays) is (chain == [GRAPH])


@pytest.mark.parametrize("mask", [[1] * 9 + [0] * 3, [1] * 4 + [0] * 2 + [1] * 6], ids=["right", "a hole"])
@pytest.mark.parametrize("chain", [[EAGER], [GRAPH]], ids=["eager", "graphs"])
def test_padding_that_is_not_on_the_left_is_the_original_s(
    chain: list[Transform], mask: list[int], fake: FakeCuda
) -> None:
    model, ids, given = tiny("llama"), torch.tensor(token_prompts(2)), torch.tensor([[1] * 12, mask])
    variant = made(model, *chain)
    answered = route.routed(model, Fallback(variant))
    assert torch.equal(ask(answered, ids, attention_mask=given), ask(model, ids, attention_mask=given))
    with pytest.raises(MeasurementError, match="padding that is not on the left"):
        ask(serving(variant), ids, attention_mask=given)


@pytest.mark.parametrize("arch", ["llama", "mistral-window"])
@pytest.mark.parametrize("chain", [[EAGER], [GRAPH]], ids=["eager", "graphs"])
def test_callers_decoded_together(arch: str, chain: list[Transform], fake: FakeCuda) -> None:
    """Rows of their own lengths, some of them free."""
    model = tiny(arch)
    shared = made(model, *chain, ContinuousBatching("decode", rows=3))
    work = [(ids, tokens) for ids, tokens in zip([*PROMPTS, *PROMPTS], (20, 3, 9, 14, 6, 30), strict=True)]
    expected = [ask(model, ids, max_new_tokens=tokens).tolist() for ids, tokens in work]
    with ThreadPoolExecutor(len(work)) as pool:
        asked = [pool.submit(ask, serving(shared), ids, max_new_tokens=tokens) for ids, tokens in work]
        assert [each.result().tolist() for each in asked] == expected


@pytest.mark.parametrize("chain", [[EAGER], [GRAPH]], ids=["eager", "graphs"])
def test_guesses_are_checked_several_at_once(chain: list[Transform], fake: FakeCuda) -> None:
    """Each token of a check sees the slots up to its own."""
    model = tiny("mistral-window")
    variant = made(model, *chain, Speculation("decode", tokens=3))
    speculation = variant.speculation
    assert speculation is not None
    speculation.costs = evenly(speculation.tokens, 1.1)
    options: dict[str, Any] = {"logits_processor": [Round()], "max_new_tokens": 40}
    assert torch.equal(ask(serving(variant), PROMPTS[0], **options), ask(model, PROMPTS[0], **options))
    assert speculation.tally.guessed > speculation.tally.steps > 0


def test_half_precision_as_a_gpu_takes_it() -> None:
    """The rules about dtypes and layouts hold: FP16 weights, logits as with a mask but for rounding."""
    model = tiny("llama").half()
    with device.stand_in(FakeCuda()), varlen.kernel():
        variant, plain = made(model, GRAPH), Variant(model).with_transform(EAGER)
        steps = list[torch.Tensor]()
        for each in (variant, plain):
            prompt = seam.cache_in(model(input_ids=PROMPTS[0], use_cache=True))
            cache = SlotCache(prompt, 32)
            cache.fill(prompt, None)
            token, position = torch.tensor([[7]]), torch.tensor([[11]])
            steps.append(slot_forward.step(each.modules["decode"], token, position, cache).float())
    torch.testing.assert_close(steps[0], steps[1], rtol=0.01, atol=0.02)


def test_it_is_compiled_in_one_piece() -> None:
    """Its shapes are known to the compiler, and nothing in it is decided by numbers."""
    model = tiny("llama")
    twin = made_decode(model)
    prompt = seam.cache_in(model(input_ids=PROMPTS[0], use_cache=True))
    cache = SlotCache(prompt, 32)
    cache.fill(prompt, None)
    token, position = torch.tensor([[7]]), torch.tensor([[11]])
    given = (twin, token, position, cache.slot, cache.valid, cache.keys, cache.values)
    with varlen.kernel(), torch.no_grad():
        expected = slot_forward.run(*given)
        compiled = torch.compile(slot_forward.run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*given), expected)


def made_decode(model: Any) -> Any:
    with device.stand_in(FakeCuda()):
        return Variant(model).with_transforms([OURS]).modules["decode"]


@pytest.mark.parametrize(
    ("arch", "changes", "slots", "hardware", "reason"),
    [
        ("llama", {}, True, CUDA, None),
        ("gemma3", {}, True, CUDA, None),
        ("llama", {}, False, CUDA, None),
        ("mamba", {}, False, CUDA, "MambaForCausalLM does not take other attention implementations"),
        ("llama", {}, True, replace(CUDA, capability="7.5"), "needs compute capability 8.0 or later"),
        ("llama", {}, True, replace(CUDA, device="cpu"), "the kernel is for CUDA devices"),
        ("llama", {"head_dim": 264}, True, CUDA, "takes heads of up to 256 numbers, .* this model's have 264"),
        ("llama", {"head_dim": 20}, True, CUDA, "a multiple of 8; this model's have 20"),
        ("gpt2", {}, True, CUDA, None),
    ],
)
def test_where_it_is_not_available(
    arch: str, changes: dict[str, Any], slots: bool, hardware: Hardware, reason: str | None
) -> None:
    model = tiny(arch, **changes).bfloat16()
    with device.stand_in(FakeCuda()):
        variant = Variant(model).with_transforms([EAGER] * slots)
        found = OURS.unavailable(variant, hardware)
    assert found is None if reason is None else re.search(reason, found or "")


def test_what_else_is_refused(fake: FakeCuda) -> None:
    model = tiny("llama")
    assert "takes FP16 and BF16" in (OURS.unavailable(Variant(model).with_transform(EAGER), CUDA) or "")
    assert OURS.unavailable(made(model, EAGER), CUDA) == "decode uses it already"
    assert Attention("decode", "sdpa:efficient").unavailable(made(model, EAGER), CUDA) == (
        "slot_attention is in use for decode, and reads fewer slots"
    )
    assert Attention("prefill", "sdpa:efficient").unavailable(made(model, EAGER), CUDA) is None
    with pytest.raises(ChoiceError, match="prefill has no slots"):
        SlotAttention("prefill")


def test_an_argument_that_the_kernel_does_not_take_is_an_error() -> None:
    """With a mask that is none, SDPA cannot answer in its place."""
    spans = attention_slots.spans(torch.tensor([[4]]), torch.zeros(3, 1, dtype=torch.int64), None, KEYS)
    query = torch.ones(3, 4, 1, 8)
    with pytest.raises(VariantError, match="does not take softcap"):
        attention_slots.attend(torch.nn.Module(), query, KEYS, KEYS, spans, softcap=30.0)


def test_another_kernel_is_no_effect(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = made(tiny("llama"), EAGER)
    monkeypatch.setattr(slot_forward, "_spans", slot_forward._masks)  # every call goes to SDPA
    assert OURS.took_effect(variant) == (
        "a step computes attention by _scaled_dot_product_flash_attention_for_cpu instead of its own"
    )
    assert OURS.took_effect(Variant(tiny("llama"))) == "decode uses sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [2, 8])  # with keys that are shared, and not
@pytest.mark.parametrize("window", [None, 100])
def test_the_kernel_of_a_gpu(kv_heads: int, window: int | None) -> None:
    """Over a view of 700 of 1000 slots: several queries, padding, and a row without a sequence."""
    torch.manual_seed(0)
    half: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(3, 8, 2, 64, **half)
    keys, values = (torch.randn(3, kv_heads, 1000, 64, **half)[:, :, :700] for _ in range(2))
    last, padding = torch.tensor([[610, 611]], device="cuda"), torch.tensor([[0], [37], [700]], device="cuda")
    index = torch.arange(700, device="cuda")
    mask = (index <= last[0, :, None]) & (index >= padding[:, :, None])
    if window is not None:
        mask &= index > last[0, :, None] - window
    wide = [held.float().repeat_interleave(8 // kv_heads, 1) for held in (keys, values)]
    expected = F.scaled_dot_product_attention(query.float(), *wide, attn_mask=mask[:, None]).transpose(1, 2)
    spans = attention_slots.spans(last, padding, window, keys)
    got, _ = attention_slots.attend(torch.nn.Module(), query, keys, values, spans)
    assert not got[2].any()
    torch.testing.assert_close(got[:2].float(), expected[:2], rtol=0.02, atol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "gpt-neox", "mistral-window"])
def test_a_captured_step_on_a_gpu(arch: str) -> None:
    from autotune.machine import hardware

    model = tiny(arch, hidden_size=256).to("cuda", torch.bfloat16)
    assert OURS.unavailable(Variant(model), hardware.probe(model)) is None
    variant, plain = made(model, GRAPH), Variant(model)
    assert OURS.took_effect(variant) is None
    ids = torch.cat(PROMPTS).to("cuda")
    logits = [
        serving(each)
        .generate(ids, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        .logits[1]
        .float()
        for each in (variant, plain)
    ]
    assert (logits[0] - logits[1]).norm() < 0.03 * logits[1].norm()
