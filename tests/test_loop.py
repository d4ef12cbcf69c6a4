"""The lean loop, the static cache and the compiled step against transformers' own loop, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from autotune import cache as slots
from autotune import kernels
from autotune.compiled import artifact
from autotune.transforms import Transform
from autotune.transforms.compile_step import CompileStep
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.one_query import OneQueryAttention
from autotune.transforms.static_cache import StaticCache, no_slots
from autotune.variant import Variant, build, serving
from autotune.workload import Workload
from tests.models import left_padded, tiny, token_prompts

PLANS: dict[str, list[Transform]] = {
    "lean": [LeanLoop()],
    "slots": [StaticCache()],
    "one query": [OneQueryAttention(phase="decode"), StaticCache()],
}
DECODERS = ["llama", "qwen3", "gpt2", "gpt-neox", "opt", "gemma3", "mistral-window", "mixtral", "phi3"]
IDS = torch.tensor([token_prompts(1)[0]])


class Banned(LogitsProcessor):
    """Forbids the token that was chosen last."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)  # type: ignore[return-value]


class Long(StoppingCriteria):
    """Stops a sequence whose tokens add up to much."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.sum(-1) > 2500


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one token": {"max_new_tokens": 1},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "processor": {"logits_processor": [Banned()]},
    "criteria": {"stopping_criteria": [Long()]},
    "end of sequence": {"eos_token_id": list(range(40))},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


def ask(model: Any, ids: torch.Tensor = IDS, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(ids, **({"max_new_tokens": 12, "do_sample": False} | options))


def same(mine: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(mine, theirs)
        return
    assert torch.equal(mine.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), atol=1e-4, rtol=1e-4)
    assert type(mine.past_key_values) is type(theirs.past_key_values)
    assert mine.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()


@pytest.fixture(autouse=True)
def built() -> None:
    if reason := kernels.available():
        pytest.skip(reason)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_every_request_is_answered_as_by_transformers(plan: str, request_: str) -> None:
    model = tiny("llama")
    served = serving(build(model, PLANS[plan]))
    options = REQUESTS[request_]
    same(ask(served, **options), ask(model, **options))
    same(ask(served, IDS[:, :3], **options), ask(model, IDS[:, :3], **options))  # a second, shorter prompt


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("arch", DECODERS)
def test_every_architecture_decodes_the_same_tokens(arch: str, plan: str) -> None:
    model, padded = tiny(arch), left_padded()
    served = serving(build(model, PLANS[plan]))
    same(ask(served, max_new_tokens=40), ask(model, max_new_tokens=40))  # beyond the sliding windows
    ids, mask = padded["input_ids"], padded["attention_mask"]
    same(ask(served, ids, attention_mask=mask), ask(model, ids, attention_mask=mask))


def test_a_model_without_slots_says_why() -> None:
    assert "past_key_values" in (no_slots(tiny("mamba")) or "")
    assert no_slots(tiny("llama")) is None


def test_a_returned_cache_is_the_callers_own() -> None:
    model = tiny("llama")
    served = serving(build(model, [StaticCache()]))
    first = ask(served, return_dict_in_generate=True)
    keys = slots.tensors(first.past_key_values)[0][0].clone()
    ask(served, IDS.flip(1))
    assert torch.equal(slots.tensors(first.past_key_values)[0][0], keys)
    longer = torch.cat([first.sequences, IDS], dim=1)
    same(ask(model, longer, past_key_values=first.past_key_values), ask(model, longer))


def test_a_nan_left_by_one_sequence_does_not_reach_the_next() -> None:
    variant = build(tiny("llama"), [StaticCache()])
    served = serving(variant)
    before = ask(served, IDS[:, :4])
    assert variant.caches is not None
    ask(served)
    (idle,) = variant.caches._idle[1]
    for tensor in (*idle.keys, *idle.values):
        tensor[:, :, : idle.length] = torch.nan
    assert torch.equal(ask(served, IDS[:, :4]), before)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "mixtral"])
def test_a_compiled_step_decodes_the_same_tokens(arch: str) -> None:
    model = tiny(arch)
    work = Workload(tuple(map(tuple, token_prompts(4))), 12, (1, 2))
    variant = Variant(model, workload=work).with_transform(CompileStep(phase="decode"))
    assert variant.step is not None
    assert {batch for batch, _ in variant.step.shapes} == {1, 2}
    served, padded = serving(variant), left_padded((9, 5))
    for prompt in (IDS, IDS[:, :3]):
        same(ask(served, prompt), ask(model, prompt))
    ids, mask = padded["input_ids"], padded["attention_mask"]
    same(ask(served, ids, attention_mask=mask), ask(model, ids, attention_mask=mask))
    three = left_padded()  # a batch nobody compiled for runs the same module uncompiled
    ids, mask = three["input_ids"], three["attention_mask"]
    same(ask(served, ids, attention_mask=mask), ask(model, ids, attention_mask=mask))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.set_attn_implementation("eager"),
        lambda m: setattr(m.config, "rms_norm_eps", 0.1),
        lambda m: m.double(),
        lambda m: setattr(m.model.layers[0].mlp, "up_proj", torch.nn.Linear(64, 96)),
    ],
    ids=["attention", "config", "dtype", "module"],
)
def test_compiled_code_is_kept_apart_by_all_that_shapes_it(change: Any) -> None:
    model = tiny("llama")
    before = artifact(model, (1, 128), True)
    assert before is not None
    assert before == artifact(tiny("llama", seed=5), (1, 128), True)  # weights are passed, not compiled in
    assert before != artifact(model, (1, 256), True)
    change(model)
    assert artifact(model, (1, 128), True) != before


def test_a_damaged_artifact_costs_a_compilation_and_nothing_else() -> None:
    model = tiny("llama")
    first = build(model, [CompileStep(phase="decode")])
    assert first.step is not None
    (shape,) = first.step.shapes
    kept = artifact(model, shape, True)
    assert kept is not None
    kept.write_bytes(b"not code")
    same(ask(serving(build(model, [CompileStep(phase="decode")]))), ask(model))
