"""Every architecture is tuned, or keeps its original, and never gives wrong output; what cannot be tuned is refused."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import autotune
from autotune import hardware, route, seam
from autotune import policy as policies
from autotune.errors import ChoiceError, TransformError
from autotune.transforms import registry
from autotune.variant import Variant
from tests.models import ARCHITECTURES, left_padded, plain_module, tiny, tiny_bert, tiny_t5, token_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from autotune.hardware import Hardware

NEW_TOKENS = 16
NEAR_TIE = 0.05  # nats between the original's two best tokens, below which either may come first
PROMPTS = token_prompts(16)
INPUTS = {
    "one prompt": {"input_ids": torch.tensor(token_prompts(1, length=10, seed=5))},
    "another, longer": {"input_ids": torch.tensor(token_prompts(1, length=30, seed=6))},
    "left-padded batch": left_padded(),
}


@pytest.fixture(scope="module")
def machine() -> Hardware:
    return hardware.probe("cpu")


def answer(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [B, N] and log-probabilities [B, N, V]."""
    out = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1).log_softmax(-1)


def first_wrong_token(expected: torch.Tensor, log_probs: torch.Tensor, got: torch.Tensor) -> str | None:
    """Where greedy tokens part other than at a near-tie of the original; after a near-tie anything may follow.

    Args:
        expected, got: [B, N].
        log_probs: the original's, [B, N, V].
    """
    top = log_probs.topk(2).values  # [B, N, 2]
    for row in range(len(expected)):
        different = (expected[row] != got[row]).nonzero()
        if len(different):
            at = int(different[0])
            margin = float(top[row, at, 0] - top[row, at, 1])
            if margin > NEAR_TIE:
                was, is_now = int(expected[row, at]), int(got[row, at])
                return f"row {row}, token {at}: {is_now} instead of {was}, margin {margin:.2f}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_tuned_or_kept_and_answers_as_before(name: str) -> None:
    model = tiny(name)
    cls, attributes = type(model), sorted(model.__dict__)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = {case: answer(model, inputs) for case, inputs in INPUTS.items()}
    policy = replace(policies.load("balanced"), budget_s=10)

    wrapped = autotune.wrap(model, policy=policy, workload=PROMPTS, when="blocking", cache=False)
    assert wrapped is model
    status = model.autotune.status
    assert status.state in ("tuned", "original")
    assert status.detail
    assert bool(status.transforms) == (status.state == "tuned")
    for trial in model.autotune.report().to_dict()["trials"]:
        assert trial["reason"], trial
    for case, inputs in INPUTS.items():
        tokens, _ = answer(model, inputs)
        assert first_wrong_token(*expected[case], tokens) is None, (case, status)

    model.autotune.unwrap()
    assert type(model) is cls
    assert sorted(model.__dict__) == attributes
    assert not route.is_routed(model)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in weights.items())
    for case, inputs in INPUTS.items():
        assert torch.equal(answer(model, inputs)[0], expected[case][0])


@pytest.mark.slow
@pytest.mark.parametrize("transform", [name for name, cls in registry().items() if cls.lossless])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_lossless_transform_answers_as_before_or_says_why_not(name: str, transform: str, machine: Hardware) -> None:
    model = tiny(name)
    expected = {case: answer(model, inputs) for case, inputs in INPUTS.items()}
    try:
        chosen = registry()[transform](phase="decode")
    except ChoiceError:  # one for prefill alone
        chosen = registry()[transform](phase="prefill")
    variant = Variant(model)
    if reason := chosen.unavailable(variant, machine):
        pytest.skip(reason)
    try:
        variant = variant.with_transform(chosen)
    except TransformError as refusal:
        pytest.skip(str(refusal))
    assert chosen.took_effect(variant) is None
    for case, inputs in INPUTS.items():
        tokens, _ = answer(route.routed(model, Fallback(variant)), inputs)
        assert first_wrong_token(*expected[case], tokens) is None, case


class Fallback:
    """A router as a wrapped model has it: what a variant cannot serve goes to the original."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def sample(self, call: seam.Sampling) -> Any:
        return call.original() if self.variant.unsupported(call) else self.variant.sample(call)

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.variant.forward(model, args, kwargs)

    def other_loop(self, name: str) -> Any:
        return nullcontext()


def on_meta() -> PreTrainedModel:
    with torch.device("meta"):
        return tiny()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (tiny_t5, "encoder-decoder"),
    "encoder": (tiny_bert, "cannot generate"),
    "plain module": (plain_module, "not a transformers PreTrainedModel"),
    "no module": (lambda: "SmolLM2", "not a transformers PreTrainedModel"),
    "decoder without a head": (lambda: tiny().model, "cannot generate"),
    "training": (lambda: tiny().train(), r"call model\.eval\(\)"),
    "meta tensors": (on_meta, "load the weights first"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_tuned_is_refused_and_left_alone(make: Callable[[], Any], said: str) -> None:
    model = make()
    before = type(model)
    with pytest.raises(autotune.UnsupportedModelError, match=said):
        autotune.wrap(model, workload=PROMPTS, when="blocking", cache=False)
    assert type(model) is before
    assert not route.is_routed(model)


@pytest.mark.parametrize(
    ("got", "wrong"),
    [([[5, 6, 7]], None), ([[5, 9, 9]], None), ([[5, 6, 8]], "row 0, token 2"), ([[4, 6, 7]], "row 0, token 0")],
    ids=["equal", "after a near-tie", "last", "first"],
)
def test_the_rule_for_greedy_tokens(got: list[list[int]], wrong: str | None) -> None:
    logits = torch.zeros(1, 3, 10)
    for position, (best, margin) in enumerate([(5, 4.0), (6, 0.01), (7, 4.0)]):
        logits[0, position, best] = margin
    found = first_wrong_token(torch.tensor([[5, 6, 7]]), logits.log_softmax(-1), torch.tensor(got))
    assert (found is None) == (wrong is None)
    assert found is None or found.startswith(str(wrong))
