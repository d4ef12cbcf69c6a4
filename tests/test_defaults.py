"""A checkpoint's defaults are its users' matter: nothing that measures knows them, and whoever serves heeds them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from autotune import profile as profiling
from autotune import transforms
from autotune.machine import hardware
from autotune.model import route, shrink
from autotune.profile import ncu_replay
from autotune.runtime.variant import Variant
from autotune.tune import selfcheck
from autotune.validate.score import Served
from autotune.workload import Workload
from tests.architectures import Fallback
from tests.models import tiny, token_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULTS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "exponential_decay_length_penalty": (2, 1.5)},
    "beams": {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
    "look-up": {"prompt_lookup_num_tokens": 3},
    "returns": {"do_sample": True, "num_return_sequences": 3},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2},
    "guidance": {"guidance_scale": 1.5},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    "short": {"max_length": 20, "min_length": 16, "eos_token_id": [2, 9]},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 2, "suppress_tokens": [5, 6]},
    "begin": {"begin_suppress_tokens": list(range(3, 200)), "bad_words_ids": [[220], [221, 222]]},
    "bias": {"sequence_bias": [[[9], 4.0]], "renormalize_logits": True, "remove_invalid_values": True},
    "chunks": {"prefill_chunk_size": 4},
    "time": {"max_time": 1000.0, "max_new_tokens": 3},
}
PLANS = {
    "lean loop": ("lean_loop", "decode"),
    "slots": ("static_cache", "decode"),
    "program": ("step_program", "decode"),
    "own loop": ("fused_layers", "prefill"),
}
NEW = 5  # tokens that are measured


def with_defaults(name: str) -> Any:
    model = tiny()
    model.generation_config.update(**DEFAULTS[name])
    return model


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Transformers warns of settings that go badly together, as it would without autotune."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Counter:
    def __init__(self) -> None:
        self.puts = 0

    def put(self, _: Any) -> None:
        self.puts += 1

    def end(self) -> None: ...


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_measures_does_not_know_them(name: str) -> None:
    model, plain, prompts = with_defaults(name), tiny(), token_prompts(2)
    defaults = model.generation_config.to_dict()
    expected = Served(Variant(plain), 0).generate(prompts, NEW)
    assert expected.shape == (2, len(prompts[0]) + NEW)
    for variant in (Variant(model), Variant(model).with_transform(transforms.make("lean_loop", {}, "decode"))):
        assert torch.equal(Served(variant, 0).generate(prompts, NEW), expected)
    seen = Counter()
    profiling.timing.request(model, torch.tensor(prompts), NEW)(seen)
    assert seen.puts == 1 + NEW
    ncu_replay.replay(model, torch.tensor(prompts), "decode")
    assert model.generation_config.to_dict() == defaults


@pytest.mark.parametrize("name", ["look-up", "returns", "beams"])
def test_a_model_with_them_is_profiled(name: str) -> None:
    work = Workload(tuple(map(tuple, token_prompts(2))), 4, (2,))
    found = profiling.measure(Variant(with_defaults(name)), work, hardware.probe("cpu"), budget_s=1.0, scaling=False)
    assert found.phases["decode"].seconds > 0


def test_untested_versions_are_checked_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    built = shrink.built

    def with_look_up(*args: Any, **options: Any) -> Any:
        model = built(*args, **options)
        model.generation_config.update(prompt_lookup_num_tokens=3, num_beams=2)
        return model

    monkeypatch.setattr(shrink, "built", with_look_up)
    assert selfcheck.difference(tiny(), clock=lambda: 0.0) is None


def answer(model: PreTrainedModel) -> Any:
    torch.manual_seed(3)
    given: Any = model
    ids = torch.tensor(token_prompts(1))
    try:
        out = given.generate(ids, attention_mask=torch.ones_like(ids), max_length=20)
    except Exception as error:
        return type(error), str(error)
    return (out if isinstance(out, torch.Tensor) else out.sequences).tolist()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_plan_serves_with_them_as_the_original_does(name: str, plan: str) -> None:
    model, (transform, phase) = with_defaults(name), PLANS[plan]
    expected = answer(model)
    variant = Variant(model).with_transform(transforms.make(transform, {}, phase))
    assert answer(route.routed(model, Fallback(variant))) == expected
