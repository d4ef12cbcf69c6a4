"""Odd inputs: a wrapped model answers, or raises, as the same model does unwrapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria

import autotune
from autotune.runtime import kernels
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.static_cache import StaticCache
from autotune.transforms.step_program import StepProgram
from autotune.tune import plan as plans
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.tuned import Tuned
from tests.live.test_wrap import Written
from tests.models import BOS, CONTEXT, EOS, PAD, VOCABULARY, tiny, tiny_tokenizer, token_prompts

PLANS: dict[str, list[Transform]] = {
    "lean loop": [LeanLoop()],
    "slots": [StaticCache(slots=CONTEXT)],
    "few slots": [StaticCache(slots=48)],
    **({"program": [StepProgram("decode", slots=CONTEXT)]} if kernels.available() is None else {}),
}
IDS = torch.tensor(token_prompts(2))  # [2, 12]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def wrapped(plan: list[Any], architecture: str = "llama") -> Any:
    """A wrapped model with a plan committed that was not searched for."""

    def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        variant = Variant(model, traffic, workload).with_transforms(plan)
        none = Fingerprint("", "", {}, "", "", "strict")
        return Tuned(variant, plans.Plan(none, variant.transforms), Written(), "won")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tune", tune)
        return autotune.wrap(tiny(architecture), workload=token_prompts(4), when="blocking", cache=False, watch=0.0)


@pytest.fixture(scope="module", params=PLANS)
def routed(request: pytest.FixtureRequest) -> Any:
    return wrapped(PLANS[request.param])


def outcome(model: Any, ids: Any, **options: Any) -> Any:
    """Tokens, or the type of what was raised."""
    torch.manual_seed(5)
    try:
        with torch.no_grad():
            out = model.generate(ids, **({"max_new_tokens": 5, "do_sample": False} | options))
    except Exception as error:
        return type(error).__name__
    return (out if isinstance(out, torch.Tensor) else out.sequences).tolist()


def agree(routed: Any, model: Any, ids: Any, **options: Any) -> Any:
    expected = outcome(model, ids, **options)
    assert routed.autotune.status.state == "tuned"
    assert outcome(routed, ids, **options) == expected
    assert outcome(routed, IDS) == outcome(model, IDS)  # and nothing poisoned the next call
    assert routed.autotune.status.state == "tuned"
    return expected


@pytest.mark.fault("C46")
@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (0, 0)])
def test_nothing_to_read(routed: Any, model: Any, shape: tuple[int, int]) -> None:
    agree(routed, model, torch.zeros(shape, dtype=torch.long))


@pytest.mark.fault("C47", "C48")
@pytest.mark.parametrize(
    ("prompt", "new"),
    [
        (CONTEXT, 1),
        (CONTEXT - 1, 1),
        (CONTEXT - 1, 2),
        (CONTEXT - 4, 4),
        (CONTEXT, 8),
        (CONTEXT + 8, 2),
        (1, 1),
        (1, 8),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_at_the_end_of_the_context(architecture: str, prompt: int, new: int) -> None:
    ids = torch.tensor(token_prompts(1, prompt))
    agree(wrapped([LeanLoop()], architecture), tiny(architecture), ids, max_new_tokens=new)


@pytest.mark.fault("C49")
@pytest.mark.parametrize("token", [-1, VOCABULARY, VOCABULARY + 7, 2**31])
def test_a_token_outside_the_vocabulary(routed: Any, model: Any, token: int) -> None:
    ids = IDS.clone()
    ids[0, 3] = token
    assert agree(routed, model, ids) == "IndexError"


@pytest.mark.fault("C50")
@pytest.mark.parametrize(
    "given_",
    [
        {"ids": IDS.int()},
        {"ids": IDS[0]},
        {"ids": IDS.t().contiguous().t()},
        {"ids": IDS[:, ::2]},
        {"ids": IDS.float()},
        {"ids": IDS.tolist()},
        {"ids": None, "inputs_embeds": torch.ones(1, 4, 64)},
        {"ids": IDS, "position_ids": torch.arange(12)[None].expand(2, -1)},
        {"ids": IDS, "position_ids": torch.arange(12)[None]},  # for both sequences
        {"ids": IDS, "position_ids": torch.arange(12, dtype=torch.int32)[None]},
        {"ids": IDS[:1], "position_ids": torch.arange(12, dtype=torch.int32)[None] + 7},
        {"ids": IDS, "position_ids": torch.arange(20)[None] + 3},  # generate reads the last twelve
        {"ids": IDS, "output_hidden_states": True, "return_dict_in_generate": True},
        {"ids": IDS, "use_cache": False},
        {"ids": IDS, "unheard_of": 1},
        {"ids": IDS, "prompt_lookup_num_tokens": 2},
        {"ids": IDS, "max_new_tokens": 0},
        {"ids": IDS, "max_new_tokens": -1},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items() if k != "ids")[:30],
)
def test_ids_and_arguments_of_every_kind(routed: Any, model: Any, given_: dict[str, Any]) -> None:
    agree(routed, model, **given_)


@pytest.mark.fault("C51")
@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.ones(2, 12),
        torch.ones(2, 12, dtype=torch.bool),
        torch.tensor([[1] * 12, [0] * 12]),
        torch.tensor([[1] * 12, [1] * 6 + [0] * 6]),  # padded on the right
        torch.tensor([[1] * 12, [1, 0] * 6]),
        torch.ones(2, 11, dtype=torch.long),
        torch.ones(2, 52, dtype=torch.long),  # as of a longer conversation; generate reads the last twelve
        torch.tensor([[0] * 20 + [1] * 32] * 2),
        torch.ones(1, 1, 12, 12),
    ],
)
def test_masks_of_every_kind(routed: Any, model: Any, mask: torch.Tensor | None) -> None:
    agree(routed, model, IDS, attention_mask=mask)


class Ending(StoppingCriteria):
    """Ends a sequence at a token, in arithmetic of 0 and 1."""

    def __call__(self, ids: torch.Tensor, _: Any, **__: Any) -> Any:
        return (ids[:, -1] % 3 == 0).long()


def own_loop(model: Any, ids: torch.Tensor, processors: Any, criteria: Any, config: Any, **given: Any) -> Any:
    """A decoding loop of the caller's, which calls the model's by position."""
    return model._sample(ids, processors, criteria, config, **given)


@pytest.mark.parametrize(
    "options",
    [
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(100)])},  # in place of the settings'
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(15)])},
        {"stopping_criteria": StoppingCriteriaList([Ending()])},
        {"stop_strings": ["a"], "tokenizer": tiny_tokenizer()},
        {"custom_generate": own_loop},
    ],
    ids=lambda options: " ".join(options),
)
def test_ends_and_loops_of_the_caller(routed: Any, model: Any, options: dict[str, Any]) -> None:
    agree(routed, model, IDS, max_new_tokens=None, eos_token_id=None, pad_token_id=PAD, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(100)])},
            "a context beyond the static cache's 48",
        ),
        ({"attention_mask": torch.ones(2, 52)}, "a mask or positions of another width"),
        ({"stop_strings": ["a"], "tokenizer": tiny_tokenizer()}, None),
        ({"stopping_criteria": StoppingCriteriaList([Ending()])}, None),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, dict) else str(given),
)
def test_what_no_plan_can_serve_is_left_to_the_original(options: dict[str, Any], reason: str | None) -> None:
    routed = wrapped(PLANS["few slots"])
    outcome(routed, IDS, max_new_tokens=None, eos_token_id=None, pad_token_id=PAD, **options)
    assert [why.startswith(reason or "none") for why in routed.autotune.status.bypassed] == [True] * (
        reason is not None
    )
    assert routed.autotune.status.served == (reason is None)


@pytest.mark.fault("C52")
def test_sizes_that_change_from_call_to_call(routed: Any, model: Any) -> None:
    for batch, length in ((1, 12), (7, 3), (2, 120), (1, 1), (9, 30), (1, 12)):
        ids = torch.tensor(token_prompts(batch, length))
        assert outcome(routed, ids) == outcome(model, ids)


ODD = ["", "\0", "\ud800", "\u202eabc", "a" * 200, "👩‍👩‍👧‍👦", "<s></s><pad>", "e\u0301\u200d", "\r\n\t", "\ufeffx"]


@pytest.mark.fault("C53")
@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_text(routed: Any, model: Any, text: str) -> None:
    tokenizer = tiny_tokenizer()
    try:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].long()
    except (UnicodeEncodeError, TypeError):  # the tokenizer's own refusal
        return
    agree(routed, model, ids)


class Raising:
    def __repr__(self) -> str:  # the same in every process that shares the tests out
        return "Raising()"

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise KeyError("mine")

    def put(self, _: Any) -> None:
        raise BrokenPipeError("the client has gone")

    def end(self) -> None: ...


@pytest.mark.fault("C54")
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "temperature": -1.0},
        {"do_sample": True, "temperature": float("nan")},
        {"do_sample": True, "top_p": 0.0},
        {"do_sample": True, "top_p": 1.5},
        {"do_sample": True, "top_k": -1},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_return_sequences": 2},
        {"logits_processor": [Raising()]},
        {"stopping_criteria": [Raising()]},
        {"streamer": Raising()},
        {"repetition_penalty": 1.3},
        {"eos_token_id": [EOS, 9, 10]},
        {"pad_token_id": None, "eos_token_id": None},
        {"bad_words_ids": [[5]]},
        {"min_new_tokens": 50},
    ],
    ids=str,
)
def test_odd_sampling_and_callbacks_that_raise(routed: Any, model: Any, options: dict[str, Any]) -> None:
    agree(routed, model, IDS[:1], **options)


ANY = st.fixed_dictionaries(
    {},
    optional={
        "do_sample": st.booleans(),
        "temperature": st.sampled_from([-1.0, 0.0, 0.3, 1.0, 5.0]),
        "top_k": st.integers(-1, 300),
        "top_p": st.sampled_from([0.0, 0.2, 1.0, 2.0]),
        "min_p": st.sampled_from([0.1, 2.0]),
        "num_beams": st.integers(0, 3),
        "num_return_sequences": st.integers(0, 2),
        "max_new_tokens": st.integers(-1, 9),
        "max_length": st.integers(0, 40),
        "min_new_tokens": st.integers(0, 12),
        "use_cache": st.booleans(),
        "repetition_penalty": st.sampled_from([0.0, 0.8, 1.2]),
        "no_repeat_ngram_size": st.integers(0, 3),
        "eos_token_id": st.sampled_from([None, EOS, -1, [EOS, 7]]),
        "pad_token_id": st.sampled_from([None, PAD, EOS]),
        "return_dict_in_generate": st.booleans(),
        "output_scores": st.booleans(),
        "output_logits": st.booleans(),
        "cache_implementation": st.sampled_from(["dynamic", "nonsense"]),
        "forced_bos_token_id": st.just(BOS),
        "renormalize_logits": st.booleans(),
    },
)


@pytest.mark.fault("C55")
@given(options=ANY, rows=st.integers(1, 3), length=st.integers(1, 30))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_arguments(routed: Any, model: Any, options: dict[str, Any], rows: int, length: int) -> None:
    ids = torch.tensor(token_prompts(rows, length))
    assert outcome(routed, ids, **options) == outcome(model, ids, **options)
