"""Every architecture is tuned, or keeps its original, and never gives wrong output; what cannot be tuned is refused."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import autotune
from autotune.errors import ChoiceError, TransformError
from autotune.machine import hardware
from autotune.model import route
from autotune.runtime.variant import Variant
from autotune.transforms import registry
from autotune.tune import policy as policies
from tests import architectures
from tests.architectures import BAD, Fallback, Result, apart, document, examine, first_wrong_token, table
from tests.models import ARCHITECTURES, left_padded, plain_module, tiny, tiny_bert, tiny_t5, token_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from autotune.machine.hardware import Hardware

NEW_TOKENS = 16
PROMPTS = token_prompts(16)
SAMPLE = ["gpt_neo", "falcon, ALiBi", "minimax", "mamba2", "mixtral", "phi3, longrope"]  # each was wrong once
INPUTS = {
    "one prompt": {"input_ids": torch.tensor(token_prompts(1, length=10, seed=5))},
    "another, longer": {"input_ids": torch.tensor(token_prompts(1, length=30, seed=6))},
    "left-padded batch": left_padded(),
}


@pytest.fixture(scope="module")
def machine() -> Hardware:
    return hardware.probe("cpu")


def answer(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return architectures.answer(model, inputs, NEW_TOKENS)


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


@pytest.mark.parametrize("name", SAMPLE)
def test_every_transform_answers_rightly_or_is_refused_beforehand(name: str, machine: Hardware) -> None:
    found = list(examine(name, machine))
    assert not [r for r in found if r.outcome in (*BAD, "LATE", "not built")]
    assert sum(r.outcome == "right" for r in found) >= 5


def _dies(*_: Any) -> None:
    os._exit(7)


def _hangs(*_: Any) -> None:
    threading.Event().wait()


def _raises(*_: Any) -> None:
    raise KeyError("nobody expected this")


@pytest.mark.parametrize(
    ("work", "limit_s", "outcome", "why"),
    [(_dies, 60.0, "CRASH", "exit code 7"), (_raises, 60.0, "CRASH", "exit code 1"), (_hangs, 0.5, "TIME-OUT", "0 s")],
)
def test_an_architecture_that_ends_its_process_costs_itself(
    work: Any, limit_s: float, outcome: str, why: str, machine: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "_work", work)
    (found,) = apart("llama", machine, False, limit_s)
    assert (found.outcome, found.architecture) == (outcome, "llama")
    assert why in found.why


RESULTS = [
    Result("llama", "lean_loop@decode", "right"),
    Result("llama", "static_cache(slots=0)@decode", "refused", "layers of llama keep nothing"),
    Result("llama", "step_program(slots=0)@decode", "WRONG", "row 0 | token 1"),
    Result("rwkv", "", "not built", "ValueError: it is not tiny"),
]


def test_the_table_of_architectures() -> None:
    assert table(RESULTS)[2:] == [
        "| llama | - | - | - | 1 right, 1 refused | 1 WRONG; step_program(slots=0)@decode: row 0 \\| token 1 |",
        "| rwkv | not built: ValueError: it is not tiny | | | | |",
    ]
    text = document(RESULTS)
    assert "2 model types have a causal LM; 1 of them were built" in text
    assert "| static_cache | layers of it keep nothing | llama |" in text


def test_a_run_is_kept_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Hardware) -> None:
    seen = list[str]()

    def found(name: str, *_: Any) -> list[Result]:
        seen.append(name)
        return [Result(name, "lean_loop@decode", "ERROR" if name == "opt" else "right")]

    monkeypatch.setattr(architectures, "OUT", tmp_path)
    monkeypatch.setattr(architectures, "ready", lambda: machine)
    monkeypatch.setattr(architectures, "apart", found)
    assert architectures.main(["--only", "llama"]) == 0
    assert architectures.main(["--only", "llama; opt", "--resume"]) == 1
    assert architectures.main(["--only", "llama"]) == 0
    assert seen == ["llama", "opt", "llama"]
    assert {r.architecture for r in architectures.read(tmp_path / "architectures.jsonl")} == {"llama", "opt"}
    assert "| opt |" in (tmp_path / "architectures.md").read_text()
    with pytest.raises(SystemExit):
        architectures.main(["--only", "lama"])
