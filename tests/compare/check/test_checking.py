"""A model against its baseline: the same passes, what is broken is told, and where."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from autotune.compare import check
from autotune.compare.check import checking, harness
from autotune.compare.check.baseline import Environment, LatencySamples
from autotune.compare.check.pace import Slowdown
from autotune.compare.check.subject import environment as environment_of
from autotune.compare.check.tasks import Suite, Task
from autotune.errors import BaselineError, MeasurementError, PlanError, UnsupportedModelError, WorkloadError
from autotune.live.wrap import wrap
from autotune.model import route, seam
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.transforms import make
from autotune.tune.fingerprint import Fingerprint, of_model
from autotune.tune.plan import Plan
from autotune.validate import Verdict
from autotune.validate.score import Served
from autotune.workload import Bucket
from tests.compare.check.conftest import subject
from tests.models import tiny, tiny_bert, token_prompts

Change = Callable[[Any], None]


def scaled(by: float) -> Change:
    def change(model: Any) -> None:
        for linear in model.model.layers[1].modules():
            if isinstance(linear, torch.nn.Linear):
                linear.weight.mul_(by)

    return change


def tired(model: Any) -> None:
    """Right as a whole, a little wrong step by step."""
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids.shape[1] == 1:
            out.logits *= 0.9
        return out

    model.forward = forward


def zeroed_head(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.weight[:, :16] = 0


def swapped_rows(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.lm_head.weight[10:90] = model.lm_head.weight[10:90].flip(0)


def poisoned(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight[3, 4] = math.nan


def other_dtype(model: Any) -> None:
    torch.nn.Module.to(model, torch.bfloat16)


def forgetful(model: Any) -> None:
    """Right as a whole, wrong step by step: what a broken cache looks like."""
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        ids = kwargs.get("input_ids", args[0] if args else None)
        return (
            out
            if ids.shape[1] > 1
            else type(out)(logits=out.logits.flip(-1), **{seam.output_cache_name(): seam.cache_in(out)})
        )

    model.forward = forward


def metric(result: check.CheckResult, name: str) -> check.Metric:
    return next(m for m in result.metrics if m.name == name)


@pytest.mark.parametrize("tier", ["lossless", "aggressive"])
def test_the_same_model_passes(folder, model, tier):
    result = check.run(model, folder, tier=tier)
    assert result.verdict is Verdict.PASS, result.reason
    assert result.exit_code == 0
    assert result.localised is None
    assert result.quality.mean_kld < 1e-6


@pytest.mark.parametrize(
    ("change", "tier", "verdict", "layer"),
    [
        (scaled(1.02), "lossless", Verdict.FAIL, "model.layers.1"),
        (scaled(1.02), "relaxed", Verdict.PASS, None),
        (scaled(1.3), "strict", Verdict.FAIL, "model.layers.1"),
        (zeroed_head, "strict", Verdict.FAIL, "model.layers.0"),
        (swapped_rows, "strict", Verdict.FAIL, "lm_head"),
        (poisoned, "aggressive", Verdict.FAIL, "model.layers.1"),
        (other_dtype, "aggressive", Verdict.FAIL, "model.embed_tokens"),
    ],
    ids=lambda value: getattr(value, "__name__", value) if callable(value) else None,
)
def test_a_corruption_is_judged_and_located(baseline, model, change, tier, verdict, layer):
    with torch.no_grad():
        change(model)
    result = check.run(model, baseline, tier=tier)
    assert result.verdict is verdict, result.reason
    if layer is None:
        assert result.localised is None
        return
    assert result.localised.first_layer == layer
    assert result.localised.summary in result.reason
    if change is poisoned:
        assert "NaN logits at token" in result.reason
    else:
        assert len(result.localised.prompts) == 5
        klds = [p.mean_kld for p in result.localised.prompts]
        assert klds == sorted(klds, reverse=True)
    if change is other_dtype:
        assert metric(result, "dtype").verdict is Verdict.FAIL


def test_what_is_wrong_in_decoding_alone_is_not_blamed_on_a_layer(baseline, model, tokenizer):
    forgetful(model)
    result = check.run(model, baseline, tokenizer=tokenizer)
    assert result.verdict is Verdict.FAIL
    assert result.localised.first_layer is None
    assert "look at decoding" in result.reason
    first = result.localised.token
    assert first.position == 0  # natural text was decoded before it
    assert first.expected_text == tokenizer.decode([first.expected])
    assert result.localised.prompts[0].text


def masked(model: Any) -> Any:
    """Rows that no token has are ruled out, as models with a padded vocabulary do."""
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        out.logits[..., 250:] = -torch.inf
        return out

    model.forward = forward
    return model


def test_tokens_that_are_ruled_out_are_no_defect(tmp_path, monkeypatch):
    monkeypatch.setattr("autotune.compare.check.compact.TOP", 100)  # so that those tokens are among the others
    prompts = [[t % 250 for t in p] for p in token_prompts(18, 40)]
    base = check.record(masked(subject()), tmp_path / "b", prompts=prompts, latency=False)
    assert check.run(masked(subject()), base, tier="lossless").verdict is Verdict.PASS
    assert check.run(subject(), base, tier="lossless").verdict is Verdict.FAIL


def test_sure_tokens_are_told_from_open_ones(baseline, model):
    with torch.no_grad():
        scaled(1.3)(model)
    buckets = check.run(model, baseline).localised.certainty
    assert sum(bucket.tokens for bucket in buckets) > 150
    assert {bucket.high for bucket in buckets} <= {0.5, 0.9, 1.0}


def test_a_model_that_raises_could_not_be_measured(baseline, model):
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel for this")

    model.forward = forward
    result = check.run(model, baseline)
    assert (result.verdict, result.exit_code) == (Verdict.ERROR, 3)
    assert "no kernel for this" in result.reason


@pytest.fixture(scope="module")
def narrow_folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A baseline of a model whose steps differ from its full forwards by more than the lossless tier allows."""
    out = tmp_path_factory.mktemp("narrow") / "baseline"
    check.record(narrow(), out, prompts=token_prompts(18, 40), latency=False)
    return out


def narrow() -> Any:
    return subject(num_hidden_layers=8, initializer_range=0.6).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "tier", "verdict"),
    [
        (None, "lossless", Verdict.PASS),
        (None, "strict", Verdict.PASS),
        (scaled(1.05), "lossless", Verdict.FAIL),
        (tired, "lossless", Verdict.FAIL),
    ],
)
def test_decoding_steps_of_a_16_bit_model_are_compared_with_recorded_steps(narrow_folder, change, tier, verdict):
    model = narrow()
    if change is not None:
        with torch.no_grad():
            change(model)
    result = check.run(model, narrow_folder, tier=tier)
    assert result.verdict is verdict, result.reason


def test_steps_that_were_not_recorded_are_not_taken_for_compared(narrow_folder):
    earlier = replace(check.load(narrow_folder), stepped=())
    with pytest.raises(BaselineError, match="record the baseline again, or choose tier strict"):
        check.run(narrow(), earlier, tier="lossless")
    assert check.run(narrow(), earlier, tier="strict").verdict is Verdict.PASS


def test_a_model_that_became_narrower_than_its_baseline_fails(baseline):
    narrowed = check.run(subject().to(torch.bfloat16), baseline, tier="lossless")
    assert narrowed.verdict is Verdict.FAIL
    assert "logits are bfloat16, recorded were float32" in [m.reason for m in narrowed.metrics]


def plan_for(model: Any, *transforms: Any) -> Plan:
    made_for = Fingerprint(of_model(model), "here", {}, "work", "policy", "strict")
    return Plan(made_for, transforms)


@dataclass(frozen=True)
class Halved(Transform):
    """Whatever the last layer adds, half of it."""

    name: ClassVar[str] = "halved"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "a test's damage"

    def apply(self, variant: Variant) -> None:
        for module in variant.edit(self.phase):
            linear = module.model.layers[1].mlp.down_proj
            linear.weight = torch.nn.Parameter(linear.weight / 2, requires_grad=False)


@pytest.mark.parametrize(
    ("transform", "verdict", "layer"),
    [(make("static_cache", {}, "decode"), Verdict.PASS, None), (Halved("decode"), Verdict.FAIL, "model.layers.1")],
    ids=str,
)
def test_a_plan_is_checked_through_the_path_that_serves(baseline, model, transform, verdict, layer):
    result = check.run(model, baseline, plan=plan_for(model, transform), tier="lossless")
    assert result.verdict is verdict, result.reason
    assert str(transform) in result.model
    assert (result.localised and result.localised.first_layer) == layer


def test_a_plan_is_not_dropped_because_a_variant_is_given(baseline, model):
    with pytest.raises(ValueError, match="a variant has its transforms already"):
        check.run(Variant(model), baseline, plan=plan_for(model, make("lean_loop", {}, "both")))


def test_what_is_left_to_the_original_says_why(baseline, model):
    short = Variant(model).with_transform(make("static_cache", {"slots": 4}, "decode"))
    assert "context beyond the static cache's 4 tokens" in check.run(short, baseline).quality.reason


def test_a_plan_for_another_model(baseline, model):
    with pytest.raises(PlanError, match=r"was made for model .*; tune this model$"):
        check.run(model, baseline, plan=plan_for(tiny("qwen3")))


def test_a_wrapped_model_and_a_variant_are_checked_as_they_serve(baseline, model):
    wrapped = wrap(model, when="manual", cache=False)
    assert check.run(wrapped, baseline).verdict is Verdict.PASS
    assert check.run(Variant(subject()), baseline).verdict is Verdict.PASS
    wrapped.autotune._serving.begin(Variant(route.bare(model)).with_transform(Halved("decode")), None)
    checked = check.run(wrapped, baseline, tier="lossless")
    assert checked.verdict is Verdict.FAIL, "its plan serves, and that is what was asked about"
    assert str(Halved("decode")) in checked.model
    wrapped.autotune.rollback()
    assert check.run(wrapped, baseline, tier="lossless").verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("changes", "options", "error", "said"),
    [
        ({"vocab_size": 300}, {}, BaselineError, "300 tokens in its vocabulary"),
        ({"max_position_embeddings": 64}, {}, BaselineError, "context is 64"),
        ({}, {"workload": token_prompts(18, 40, seed=5)}, BaselineError, "not the 18 that were recorded"),
        ({}, {"tier": "perfect"}, ValueError, "no quality tier"),
        ({}, {"max_slowdown": -1.0}, ValueError, "max_slowdown"),
        ({}, {"measure_latency": True}, BaselineError, "latency cannot be checked, because it was not recorded"),
        ({}, {"max_slowdown": 0.01}, BaselineError, "latency cannot be checked, because it was not recorded"),
    ],
)
def test_what_cannot_be_compared_is_refused(baseline, changes, options, error, said):
    with pytest.raises(error, match=said):
        check.run(subject(**changes), baseline, **options)


def test_another_tokenizer_is_refused(baseline, model, tokenizer):
    recorded = replace(baseline, subject=replace(baseline.subject, tokenizer="another"))
    with pytest.raises(BaselineError, match="tokenizer"):
        check.run(model, recorded, tokenizer=tokenizer)


def test_what_is_no_causal_model(baseline):
    with pytest.raises(UnsupportedModelError):
        check.run(tiny_bert(), baseline)


@pytest.mark.parametrize(
    ("tuned", "verdict", "said"),
    [
        (token_prompts(18, 40)[:3], Verdict.INCONCLUSIVE, "3 of the 18 prompts were tuned on"),
        (token_prompts(5, 40, seed=7), Verdict.PASS, "none of the 18"),
    ],
)
def test_prompts_that_were_tuned_on_are_flagged(baseline, model, tuned, verdict, said):
    found = metric(check.run(model, baseline, tuning_prompts=tuned), "leakage")
    assert found.verdict is verdict
    assert said in found.reason


def test_a_wrapped_models_own_prompts_are_known(baseline, model):
    wrapped = wrap(model, when="manual", cache=False)
    wrapped.autotune._tuning.given = wrapped.autotune._tuning.read(token_prompts(18, 40))
    assert metric(check.run(wrapped, baseline), "leakage").verdict is Verdict.INCONCLUSIVE


def test_more_memory_is_a_regression(baseline, model):
    small = replace(baseline, subject=replace(baseline.subject, weights_bytes=baseline.subject.weights_bytes // 2))
    assert metric(check.run(model, small), "memory").verdict is Verdict.FAIL


def with_pace(baseline: check.Baseline, median_s: float, **environment: Any) -> check.Baseline:
    samples = dict.fromkeys(("ttft", "tpot", "end_to_end"), (median_s,) * 16)
    here = environment_of(subject())
    return replace(
        baseline,
        pace=(LatencySamples(Bucket(1, 8, 4), samples, 0.01),),
        environment=replace(here, **environment),
    )


@dataclass
class Clock:
    """Every look takes a while."""

    step_s: float = 1e-3
    now_s: float = 0.0

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@pytest.mark.parametrize(
    ("median_s", "environment", "verdict", "said"),
    [
        (1e-3, {}, Verdict.PASS, "tpot of b1/p8/n4 changed by +0.0%"),
        (0.5e-3, {}, Verdict.FAIL, "+100.0%"),
        (1e-3, {"threads": 99}, Verdict.INCONCLUSIVE, "recorded on another machine"),
        (1e-3, {"name": "abacus"}, Verdict.INCONCLUSIVE, "recorded on another machine"),
    ],
)
def test_latency_counts_only_on_the_same_machine(baseline, model, median_s, environment, verdict, said):
    recorded = with_pace(baseline, median_s, **environment)
    metrics = checking._latency_metrics(recorded, Variant(model), None, 0.05, Clock(), lambda step: None)
    (found,) = [m for m in metrics if m.name in ("latency", "latency tpot b1/p8/n4")]
    assert found.verdict is verdict, found.reason
    assert said in found.reason


def test_latency_is_recorded_and_compared(model, tmp_path, monkeypatch):
    monkeypatch.setattr("autotune.compare.check.recording.NEW_TOKENS", 3)
    base = check.record(model, tmp_path / "b", prompts=token_prompts(18, 40), clock=Clock())
    assert base.pace[0].noise == pytest.approx(0.0, abs=1e-6)
    names = {f"latency {name} b1/p40/n3" for name in ("ttft", "tpot", "end_to_end")}
    result = check.run(model, check.load(tmp_path / "b"), clock=Clock(2e-3))
    assert result.verdict is Verdict.FAIL
    assert {m.name for m in result.metrics if m.verdict is Verdict.FAIL} == names


@pytest.mark.parametrize("max_slowdown", [0.05, 0.0])
def test_against_the_recorded_model_both_are_timed_here(baseline, model, max_slowdown):
    recorded = with_pace(baseline, 9.0, name="another machine")
    result = check.run(model, recorded, against=subject(), clock=Clock(), max_slowdown=max_slowdown)
    found = metric(result, "latency (paired)")
    assert found.verdict is Verdict.PASS, found.reason
    assert abs(found.value) < 1e-6


def test_another_model_to_time_against_is_refused_before_the_exam(baseline, model, monkeypatch):
    monkeypatch.setattr(checking, "examine", lambda *_: pytest.fail("it took long"))
    with pytest.raises(BaselineError, match="not the one recorded"):
        check.run(model, baseline, against=subject(seed=3))
    with pytest.raises(ValueError, match="measure_latency=False leaves out"):
        check.run(model, baseline, against=subject(), measure_latency=False)


@pytest.mark.parametrize(
    ("recorded", "options", "timed"),
    [
        (False, {}, False),
        (True, {}, True),
        (True, {"measure_latency": False}, False),
        (True, {"measure_latency": False, "max_slowdown": 0.01}, False),
        (False, {"against": True}, True),
        (False, {"against": True, "measure_latency": True}, True),
    ],
)
def test_latency_is_checked_if_it_was_recorded_or_asked_for(baseline, model, recorded, options, timed):
    base = with_pace(baseline, 1e-3) if recorded else baseline
    options = options | ({"against": subject()} if "against" in options else {})
    names = {m.name.partition(" ")[0] for m in check.run(model, base, clock=Clock(), **options).metrics}
    assert ("latency" in names) is timed


def test_tasks_are_compared_one_by_one(baseline, model):
    prompts = [tuple(p) for p in token_prompts(8, 12, seed=4)]
    served = Served(Variant(model), 0)
    given = tuple(Task(p, answer=tuple(served.generate([p], 2)[0, 12:].tolist())) for p in prompts)
    suite = Suite("tasks", given, tuple(map(str, range(8))), (True,) * 8)
    recorded = replace(baseline, suites=(suite, Suite("lm-eval:arc", (), ("0",), (True,))))
    same = check.run(model, recorded)
    assert metric(same, "tasks").verdict is Verdict.PASS
    assert metric(same, "lm-eval:arc").verdict is Verdict.INCONCLUSIVE
    assert "unavailable" in metric(same, "lm-eval:arc").reason
    other = check.run(subject(seed=3), recorded)
    assert metric(other, "tasks").verdict is Verdict.FAIL
    assert len(other.flips["tasks"].lost) >= 5


def test_two_filters_over_the_same_answers_are_not_two_losses(baseline, model, tokenizer, monkeypatch):
    """Three documents lost are too few to tell; counted once for each filter they would be a regression."""
    ids = tuple(f"sums/{name}/{k}" for name in ("strict", "flexible") for k in range(10))
    recorded = replace(baseline, suites=(Suite("lm-eval:sums", (), ids, (True,) * 20),))
    now = Suite("lm-eval:sums", (), ids[::-1], tuple(not key.endswith(("0", "1", "2")) for key in ids[::-1]))
    monkeypatch.setattr(harness, "answer", lambda *_: now)
    metrics, flips = checking._task_metrics(recorded, Variant(model), tokenizer, str)
    assert {m.name: (m.verdict, m.value, m.recorded) for m in metrics} == {
        "lm-eval:sums (strict)": (Verdict.INCONCLUSIVE, 0.7, 1.0),
        "lm-eval:sums (flexible)": (Verdict.INCONCLUSIVE, 0.7, 1.0),
    }
    assert flips["lm-eval:sums (flexible)"].lost == ("sums/flexible/0", "sums/flexible/1", "sums/flexible/2")


def test_outcomes_that_an_earlier_version_kept_by_document_alone_are_not_compared(baseline, model, monkeypatch):
    recorded = replace(baseline, suites=(Suite("lm-eval:sums", (), ("0", "1"), (True, True)),))
    now = Suite("lm-eval:sums", (), ("sums/strict/0", "sums/strict/1"), (True, True))
    monkeypatch.setattr(harness, "answer", lambda *_: now)
    monkeypatch.setattr(harness, "unavailable", lambda: None)
    (metric,), _ = checking._task_metrics(recorded, Variant(model), None, str)
    assert metric.verdict is Verdict.ERROR
    assert "record the baseline again" in metric.reason


def test_tasks_are_checked_before_anything_takes_long(model, tmp_path, monkeypatch):
    monkeypatch.setattr("autotune.validate.exam.Exam.prepare", lambda *_, **__: pytest.fail("it took long"))
    (tmp_path / "tasks.jsonl").write_text('{"prompt": [5], "answer": [100000]}')
    with pytest.raises(WorkloadError, match=r"tasks\.jsonl, line 1 has the token id 100000"):
        check.record(model, tmp_path / "b", prompts=token_prompts(18, 40), labelled=tmp_path / "tasks.jsonl")


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        (token_prompts(3, 40), {}, "need 13 more prompts"),
        (token_prompts(18, 40), {"size": "huge"}, "quick, standard or thorough"),
        (None, {}, "without a tokenizer"),
        (["text"], {}, "tokenizer"),
    ],
)
def test_what_cannot_be_recorded_is_refused(model, tmp_path, prompts, options, said):
    with pytest.raises(WorkloadError, match=said):
        check.record(model, tmp_path / "b", prompts=prompts, latency=False, **options)
    assert not (tmp_path / "b").exists()


def test_a_task_of_a_harness_that_is_not_there_is_said_at_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MeasurementError, match="not installed"):
        check.record(model, tmp_path / "b", prompts=token_prompts(18, 40), latency=False, lm_eval=["arc_easy"])


def test_environments_and_slowdowns_are_values():
    assert Environment("cpu", "x", "AVX2", 2, {"torch": "2"}).machine() == "cpu, x, AVX2, 2 threads"
    assert Slowdown(0.1, 0.0, 0.2) == Slowdown(0.1, 0.0, 0.2)
