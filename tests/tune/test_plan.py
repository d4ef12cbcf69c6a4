"""Plans: to JSON and back without loss, strict about everything read, applied only to their own model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from autotune import transforms
from autotune.errors import ChoiceError, PlanError
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.tune import fingerprint, plan
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.plan import Plan, Trial, TrialOutcome
from autotune.validate import BucketTimes, Latency, Quality, Speedup, Verdict
from tests import models

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

THREADS = transforms.make("threads", {"count": 1}, "decode")
EAGER = transforms.make("attention", {"implementation": "eager"})
FINGERPRINT = Fingerprint("m" * 32, "cpu, Some CPU, AVX2, 2 threads", {"torch": "2.13.0"}, "w", "balanced:1", "strict")
FASTER = Speedup(1.5, 1.4, 1.6, 25)
QUALITY = Quality("strict", Verdict.PASS, "mean KLD 0.001", mean_kld=0.001, tokens=900, strata={"natural": 0.001})
LATENCY = Latency(
    Verdict.PASS,
    "1.5x",
    FASTER,
    FASTER,
    FASTER,
    noise=0.02,
    buckets={"b1/p64/n32": BucketTimes({"tpot": FASTER}, {"tpot": (0.03, 0.031)}, {"tpot": (0.02, 0.021)})},
    warnings=("noisy",),
)
FULL = Plan(
    FINGERPRINT,
    (EAGER, THREADS),
    QUALITY,
    LATENCY,
    trials=(
        Trial(THREADS, "threads", "decode", TrialOutcome.ACCEPTED, "1.5x", 1.6, QUALITY, LATENCY, 3.5, 0.1),
        Trial(EAGER, "attention", "prefill", TrialOutcome.SKIPPED, "1.01x at best"),
    ),
    created="2026-01-01T00:00:00+00:00",
    summary={"phases": {"decode": {"speedup": 1.5, "evidence": "at most 1 µs"}}, "trials": [1, 2.5, None, True]},
)
KEEP = Plan(FINGERPRINT, ())  # keep the original


@pytest.mark.parametrize("value", [FULL, KEEP], ids=["full", "keep"])
def test_a_plan_survives_json(value: Plan) -> None:
    text = plan.dumps(value)
    assert "NaN" not in text
    back = plan.loads(text)
    assert plan.to_dict(back) == plan.to_dict(value)  # NaN is not equal to itself: compare what it is written as
    assert (back.transforms, back.fingerprint, back.latency) == (value.transforms, value.fingerprint, value.latency)
    assert plan.dumps(back) == text
    assert plan.loads(text.encode()).transforms == value.transforms


def test_numbers_that_were_not_measured_come_back_as_such() -> None:
    back = plan.loads(plan.dumps(FULL))
    assert back.quality is not None
    assert math.isnan(back.quality.p99_kld)
    assert back.quality.mean_kld == 0.001


def _made(name: str, phase: str) -> transforms.Transform | None:
    try:
        return transforms.make(name, {}, phase)
    except ChoiceError:  # some are for one phase alone
        return None


@pytest.mark.parametrize("name", transforms.registry())
def test_every_transform_survives_json(name: str) -> None:
    made = next(t for phase in ("both", "decode", "prefill") if (t := _made(name, phase)) is not None)
    assert plan.loads(plan.dumps(replace(KEEP, transforms=(made,)))).transforms == (made,)


def _set(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d.pop("schema"), "schema is None"),
        (_set("schema", to=plan.SCHEMA + 1), f"schema is {plan.SCHEMA + 1}; .* tune again"),
        (_set("schema", to=0), "schema is 0"),
        (_set("schema", to="1"), "schema is '1'"),
        (_set("surprise", to=1), "plan has the unknown key 'surprise'"),
        (_set("fingerprint", "gpu", to=1), "plan.fingerprint has the unknown key 'gpu'"),
        (lambda d: d.pop("fingerprint"), "plan has no 'fingerprint'"),
        (lambda d: d["fingerprint"].pop("model"), "plan.fingerprint has no 'model'"),
        (_set("fingerprint", to=[]), "plan.fingerprint is of type list; expected dict"),
        (_set("fingerprint", "model", to=None), "plan.fingerprint.model is of type NoneType; expected str"),
        (_set("fingerprint", "versions", to=[]), "plan.fingerprint.versions is of type list"),
        (_set("fingerprint", "versions", "torch", to=2), "plan.fingerprint.versions.torch is of type int"),
        (_set("transforms", to={}), "plan.transforms is of type dict; expected list"),
        (_set("transforms", 0, to="threads"), r"plan.transforms\[0\] is of type str; expected dict"),
        (_set("transforms", 0, "name", to="os.system"), "no transform 'os.system'"),
        (_set("transforms", 0, "name", to="autotune.transforms.threads:Threads"), "no transform"),
        (_set("transforms", 0, "name", to="../threads"), "no transform '../threads'"),
        (_set("transforms", 0, "name", to=["threads"]), "name is of type list; expected str"),
        (_set("transforms", 0, "phase", to="training"), "phase is 'training'"),
        (_set("transforms", 0, "params", to=[]), "params is of type list; expected dict"),
        (_set("transforms", 1, "params", "count", to="1"), "count must be int"),
        (_set("transforms", 1, "params", "count", to=True), "count must be int"),
        (_set("transforms", 1, "params", "count", to=-1), "count must be at least 1"),
        (_set("transforms", 1, "params", "__class__", to="x"), "no parameter '__class__'"),
        (_set("transforms", 1, "extra", to=1), "expected name, phase and params"),
        (lambda d: d["transforms"][0].pop("params"), "expected name, phase and params"),
        (_set("trials", 0, "target", to="training"), "target is 'training'; expected one of prefill, decode"),
        (_set("trials", 0, "outcome", to="great"), "outcome is 'great'; expected one of accepted"),
        (_set("trials", 0, "transform", "name", to="gone"), "no transform 'gone'"),
        (_set("quality", "verdict", to=1), "plan.quality.verdict is of type int"),
        (_set("quality", "mean_kld", to="0.1"), "plan.quality.mean_kld is of type str"),
        (_set("quality", "tokens", to=1.5), "plan.quality.tokens is of type float; expected int"),
        (_set("quality", "tokens", to=True), "plan.quality.tokens is of type bool"),
        (_set("latency", "ttft", to=1.5), "plan.latency.ttft is of type float"),
        (_set("latency", "buckets", "b1/p64/n32", "reference_s", "tpot", to=[None, "x"]), r"tpot\[1\] is of type str"),
        (_set("latency", "reference_s", to=5), "plan.latency is not what an earlier version wrote"),
        (_set("latency", "warnings", to=[1]), r"plan.latency.warnings\[0\] is of type int"),
        (_set("created", to=5), "plan.created is of type int"),
        (_set("summary", to=[]), "plan.summary is of type list"),
    ],
)
def test_what_does_not_fit_is_refused(edit: Callable[[dict[str, Any]], None], says: str) -> None:
    data = json.loads(plan.dumps(FULL))
    edit(data)
    with pytest.raises(PlanError, match=says):
        plan.from_dict(data)


def test_samples_in_one_row_are_read_as_earlier_versions_wrote_them() -> None:
    second = BucketTimes({"tpot": FASTER}, {"tpot": (0.05, 0.06)}, {"tpot": (0.04, 0.03)})
    now = replace(FULL, latency=replace(LATENCY, buckets=LATENCY.buckets | {"b8/p64/n32": second}))
    data = json.loads(plan.dumps(now))
    for table in (data["latency"], *(trial["latency"] for trial in data["trials"] if trial["latency"])):
        buckets = table.pop("buckets")
        table["buckets"] = {label: times["speedups"] for label, times in buckets.items()}
        for arm in ("reference_s", "candidate_s"):
            table[arm] = {"tpot": [s for times in buckets.values() for s in times[arm]["tpot"]]}
    assert plan.dumps(plan.from_dict(data)) == plan.dumps(now)


def _text(fragment: str) -> str:
    return plan.dumps(KEEP)[:-2].rstrip() + f', "extra": {fragment}}}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not strict JSON"),
        (plan.dumps(FULL)[:-40], "not strict JSON"),
        (b"\x80\x04\x95\x00", "not strict JSON"),
        (b"\xef\xbb\xbf" + plan.dumps(KEEP).encode(), "not strict JSON"),
        (plan.dumps(KEEP).encode("utf-16"), "not strict JSON"),
        (plan.dumps(KEEP) + "x", "not strict JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("[" * 40 + "]" * 40, "nested deeper than 16"),
        ("[]", "found a list"),
        ("null", "found a NoneType"),
        ('{"schema": 1, "schema": 1}', "a key is there twice"),
        (_text("NaN"), "NaN is not a JSON number"),
        (_text("-Infinity"), "-Infinity is not a JSON number"),
        (_text("1e999"), "too large"),
        (_text("9" * 30), "too large"),
        (_text("9" * 100_000), "too large"),
        (_text("9223372036854775808"), "too large"),
        (_text('"\\u001b[2J"'), "unprintable"),
        (_text('{"\\u0000": 1}'), "unprintable"),
        (_text('"\\ud800"'), "unprintable"),
    ],
)
def test_text_that_is_not_strict_json_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        plan.loads(text)


def test_reasons_with_unprintable_characters_are_cleaned_when_written() -> None:
    trial = Trial(EAGER, "s", "decode", TrialOutcome.ERROR, "g++: \x1b[31merror\x1b[0m\nat \ud800")
    (back,) = plan.loads(plan.dumps(replace(KEEP, trials=(trial,)))).trials
    assert back.reason == "g++: \ufffd[31merror\ufffd[0m\nat \ufffd"


def test_a_summary_that_is_not_json_is_refused_when_written() -> None:
    with pytest.raises(PlanError, match="a Tensor cannot be stored"):
        plan.dumps(replace(KEEP, summary={"x": torch.zeros(1)}))


def _made_for(model: PreTrainedModel, *chosen: transforms.Transform) -> Plan:
    return Plan(replace(FINGERPRINT, model=fingerprint.of_model(model)), chosen)


def test_apply_makes_the_variant_and_leaves_the_model_alone(llama: PreTrainedModel) -> None:
    ids = torch.tensor(models.token_prompts(2))
    before, implementation = llama(ids).logits, llama.config._attn_implementation
    made = _made_for(llama, THREADS, EAGER)
    for model in (llama, serving(Variant(llama))):
        applied = made.apply(model)
        assert set(applied.transforms) == {EAGER, THREADS}
        assert applied.transforms[0] == EAGER  # in order of their stages
        assert applied.threads == {"decode": 1}
        assert torch.allclose(serving(applied)(ids).logits, before, atol=1e-4)
    assert llama.config._attn_implementation == implementation
    assert torch.equal(llama(ids).logits, before)


def test_an_empty_plan_is_the_original(llama: PreTrainedModel) -> None:
    applied = _made_for(llama).apply(llama)
    assert applied.modules == {"prefill": llama, "decode": llama}


def test_a_plan_in_a_file(tmp_path: Path) -> None:
    FULL.save(tmp_path / "plan.json")
    assert plan.dumps(Plan.load(str(tmp_path / "plan.json"))) == plan.dumps(FULL)
    (tmp_path / "other.json").write_text("[]")
    for name, problem in (("none.json", "cannot be read: No such file"), ("other.json", "a plan is a JSON object")):
        with pytest.raises(PlanError, match=rf"{name}:? {problem}"):
            Plan.load(tmp_path / name)


def test_apply_refuses_another_model(llama: PreTrainedModel) -> None:
    made = _made_for(llama, THREADS)
    other = models.tiny("llama", seed=1)
    with pytest.raises(PlanError, match=r"was made for model .* pass check=False"):
        made.apply(other)
    assert made.apply(other, check=False).transforms == (THREADS,)
