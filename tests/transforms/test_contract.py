"""What every transform promises, built-in or not: it says why not, or it edits a variant and nothing else."""

from __future__ import annotations

import hashlib
import os
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config

from autotune.errors import ChoiceError, TransformError
from autotune.machine.hardware import Hardware
from autotune.runtime.dispatch import serving
from autotune.runtime.speculation.pace import evenly
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.transforms import make, registry
from autotune.transforms.linears import LinearTransform
from tests import models
from tests.surroundings import surroundings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# parameters to try beside the defaults
PARAMS: dict[str, list[dict[str, Any]]] = {
    "attention": [{"implementation": name} for name in ("sdpa", "eager", "flash_attention_2")],
    "bitsandbytes": [{"scheme": name} for name in ("int8", "int8_vectorwise", "nf4", "fp4")],
    "linear_dtype": [{"dtype": "bfloat16"}, {"dtype": "float16"}],
    "prefill_attention": [{"precision": name} for name in ("float32", "bfloat16", "bfloat16x3")],
    "quantised_cache": [{"scheme": name} for name in ("int8", "fp8", "int4")],
    "speculation": [{"draft": "prompt"}, {"draft": "model"}],
    "threads": [{"count": 1}, {"count": 2}, {"count": 10_000}],
    "torchao": [
        {"scheme": name, "compile": False}
        for name in (
            "int8_weight_only",
            "int8_dynamic",
            "int4_weight_only",
            "int4_hqq",
            "float8_weight_only",
            "float8_dynamic",
        )
    ],
    "triton_weights": [{"bits": 8}, {"bits": 4}, {"bits": 4, "wide": "lm_head"}],
    "weight_only": [
        {"bits": 8},
        {"bits": 4, "group": 64},
        {"bits": 8, "skip": "lm_head"},
        {"bits": 4, "wide": "lm_head"},
        {"bits": 4, "rounding": "compensated"},
        {"bits": 4, "wide": "lm_head", "wide_as": "int6"},
        {"bits": 6},
    ],
    "weight_storage": [{"dtype": "float16"}, {"dtype": "bfloat16"}],
}
COMPILER = Hardware(
    device="cpu",
    name="test",
    capability="AVX2",
    threads=torch.get_num_threads(),
    memory_bytes=2**34,
    bandwidth_bytes_per_s=25e9,
    flops_per_s={"float32": 140e9, "bfloat16": 0.15e9},
    compiler="g++",
    versions={},
)


def candidates(*phases: str) -> list[Any]:
    """Every transform with every listed set of parameters, for each of `phases` it accepts."""
    cases = []
    for name, cls in registry().items():
        for params in PARAMS.get(name, [{}]):
            for phase in phases:
                try:
                    transform = make(name, params, phase)
                except ChoiceError:
                    continue
                slow = [pytest.mark.slow] if cls.stage in (Stage.COMPILE, Stage.GRAPH) else []
                cases.append(pytest.param(transform, id=str(transform), marks=slow))
    return cases


EXCHANGES = [case for case in candidates("both") if isinstance(case.values[0], LinearTransform)]


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def original(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One model for all tests: each of them proves that it left it alone."""
    return models.tiny(request.param)


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.tensor(models.token_prompts(count=2, length=9))  # [2, 9]


def contents(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that a transform must leave alone."""
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    tensors = {
        name: (id(t), t.data_ptr(), t._version, hashlib.sha256(t.detach().numpy().tobytes()).hexdigest())
        for name, t in named
    }
    modules = {name: (type(module), tuple(sorted(vars(module)))) for name, module in model.named_modules()}
    return {
        "tensors": tensors,
        "modules": modules,
        "config": model.config.to_json_string(),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_json_string(),
    }


def world() -> dict[str, Any]:
    """Everything about the process that a transform must leave alone."""
    return {
        **surroundings(),
        "random": torch.get_rng_state().tolist(),
        # but for the note that inductor leaves to itself there
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("_TORCHINDUCTOR_")},
        "inductor": torch._inductor.config.get_config_copy(),
        "dynamo": torch._dynamo.config.get_config_copy(),
    }


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


@pytest.fixture(autouse=True)
def _guessing_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether guesses pay is not left to this machine's clock."""
    costs = "autotune.transforms.speculation.measure_costs"
    monkeypatch.setattr(costs, lambda variant: evenly(variant.speculation.tokens, 1.2))


@pytest.mark.fault("A27", "A28")
@pytest.mark.parametrize("transform", candidates("decode", "prefill"))
def test_says_why_not_or_edits_the_variant_alone(
    transform: Transform, original: PreTrainedModel, prompts: torch.Tensor
) -> None:
    before, expected, variant = contents(original), logits(original, prompts), Variant(original)
    transform.unavailable(variant, COMPILER)  # loads what the transform needs, once
    around = world()
    reason, candidate = transform.unavailable(variant, COMPILER), variant
    if reason is None:
        try:
            candidate = variant.with_transform(transform)
        except TransformError as refusal:  # what only trying tells
            reason = str(refusal)
    if reason is None:
        served = serving(candidate).generate(prompts, max_new_tokens=4, min_new_tokens=4)
        assert transform.took_effect(candidate) is None
        assert transform.took_effect(variant) is not None, "it takes effect on a variant it was not applied to"
        assert served.shape == (2, 13)
        assert torch.equal(served[:, :9], prompts)
        untouched = {"prefill", "decode"} - set(transform.phases)
        assert all(candidate.modules[phase] is original for phase in untouched)
    else:
        assert len(reason.split()) > 3, "not a sentence"
    assert world() == around
    assert contents(original) == before
    assert torch.equal(logits(original, prompts), expected)
    assert variant.transforms == ()
    assert set(variant.modules.values()) == {original}


@pytest.mark.fault("A28")
@pytest.mark.parametrize("transform", candidates("decode", "both"))
def test_ties_survive(transform: Transform) -> None:
    """In a twin the embedding keeps its table, and the output layer is tied to it or a layer of its own."""
    model = models.tiny("llama")
    variant = Variant(model)
    if transform.unavailable(variant, COMPILER) is not None:
        return
    candidate = variant.with_transform(transform)
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    for module in candidate.modules.values():
        assert module.get_input_embeddings().weight is table
        head = module.get_output_embeddings()
        assert head.weight is table if type(head) is torch.nn.Linear else module is not model


@pytest.mark.fault("A2")
@pytest.mark.parametrize("transform", EXCHANGES)
def test_a_failure_half_way_leaves_the_original(
    transform: LinearTransform, original: PreTrainedModel, prompts: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant(original)
    if transform.unavailable(variant, COMPILER) is not None or transform.params.get("rounding"):
        return  # compensated layers are made elsewhere: test_compensation
    before, expected, exchange = contents(original), logits(original, prompts), type(transform).exchange
    done: list[torch.nn.Linear] = []

    def fail_third(self: LinearTransform, linear: torch.nn.Linear) -> torch.nn.Module | None:
        if len(done) == 2:
            raise MemoryError("half-way")
        done.append(linear)
        return exchange(self, linear)

    monkeypatch.setattr(type(transform), "exchange", fail_third)
    with pytest.raises(MemoryError, match="half-way"):
        variant.with_transform(transform)
    assert contents(original) == before
    assert torch.equal(logits(original, prompts), expected)
    assert set(variant.modules.values()) == {original}


@pytest.mark.parametrize("transform", EXCHANGES)
def test_weights_are_exchanged_once(transform: LinearTransform, llama: PreTrainedModel) -> None:
    variant = Variant(llama)
    if transform.unavailable(variant, COMPILER) is not None or transform.skip:
        return
    candidate = variant.with_transform(transform)
    reason = transform.unavailable(candidate, COMPILER)
    assert reason is not None
    assert str(transform) in reason


@pytest.mark.parametrize(("name", "cls"), registry().items())
def test_is_described(name: str, cls: type[Transform]) -> None:
    assert cls.name == name
    assert isinstance(cls.stage, Stage)
    assert "\n" not in cls.summary
    assert 10 < len(cls.summary) < 100
