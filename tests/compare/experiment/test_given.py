"""What may be given for an arm, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune import Experiment, ExperimentError
from autotune.compare.experiment.arms import fingerprint, is_same
from autotune.compare.experiment.given import classify
from autotune.model.route import routed
from autotune.runtime.variant import Variant
from autotune.transforms import make
from autotune.tune import plan as plans
from autotune.tune import policy as policies
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.plan import Plan
from tests.compare.experiment.scripted import WORK
from tests.models import plain_module, tiny, tiny_bert

MODEL = tiny()
EMPTY = Plan(Fingerprint("m", "h", {}, "w", "p", "strict"), ())
THREADS = make("threads", {"count": 1})


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Variant(MODEL), "variant"),
        (THREADS, "transforms"),
        ([THREADS], "transforms"),
        ([], "transforms"),
        (EMPTY, "plan"),
        ("lossless", "policy"),
        (policies.load("lossless"), "policy"),
        (MODEL, "model"),
    ],
)
def test_kinds(value: Any, kind: str) -> None:
    assert classify("candidate 'a'", "a", value).kind == kind


def test_files(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plans.dumps(EMPTY))
    MODEL.save_pretrained(tmp_path / "model")
    assert classify("candidate 'a'", "a", tmp_path / "plan.json").kind == "plan"
    assert classify("candidate 'a'", "a", str(tmp_path / "model")).kind == "checkpoint"


def test_a_wrapped_model_stands_for_the_model_as_it_is() -> None:
    given = classify("control", "control", routed(MODEL, None))
    assert is_same(given.value, MODEL)
    assert type(given.value) is type(MODEL)


@pytest.mark.parametrize(
    ("control", "candidates", "words"),
    [
        (MODEL, {"a": "losless"}, "candidate 'a': there is no policy 'losless', did you mean 'lossless'?"),
        (MODEL, {"a": "int8"}, "candidate 'a': there is no policy 'int8'; available: balanced"),
        (MODEL, {"a": "no/such/model/here"}, "candidate 'a': there is no file or directory"),
        (MODEL, {"a": "gone.json"}, "candidate 'a': gone.json cannot be read: No such file"),
        (MODEL, {"a": "b" * 300}, "b cannot be read: File name too long"),
        (MODEL, {"a": 7}, "candidate 'a' is of type int; expected a Variant"),
        (MODEL, {"a": [THREADS, "threads"]}, "candidate 'a' is of type list; expected a Variant"),
        (MODEL, {"a": plain_module()}, "candidate 'a': Sequential is not a transformers PreTrainedModel"),
        (MODEL, {"a": tiny_bert()}, "candidate 'a': BertForMaskedLM cannot generate"),
        (MODEL, {}, "there are no candidates"),
        (MODEL, {"control": []}, "a candidate is called 'control'"),
        (MODEL, {"a b": []}, "the name 'a b' cannot be used"),
        (None, {"a": []}, "there is no control; expected control=model"),
        (EMPTY, {"a": []}, "the control is a plan, which has no model of its own"),
        ("lossless", {"a": []}, "the control is a policy, which has no model of its own"),
    ],
)
def test_what_cannot_be_an_arm(control: Any, candidates: dict[str, Any], words: str) -> None:
    with pytest.raises(ExperimentError) as raised:
        Experiment("x", control=control, candidates=candidates)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tier": "stric"}, "there is no tier 'stric', did you mean 'strict'?"),
        ({"objective": "tpt"}, "there is no objective 'tpt', did you mean 'tpot'?"),
    ],
)
def test_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ExperimentError) as raised:
        Experiment("x", control=MODEL, candidates={"a": []}, **options)
    assert words in str(raised.value)


def test_arms_are_built(tmp_path: Path) -> None:
    tiny(seed=1).save_pretrained(tmp_path / "other")
    candidates = {
        "threads": THREADS,
        "plan": EMPTY,
        "other": tmp_path / "other",
        "narrow": tiny(vocab_size=100),
        "short": tiny(max_position_embeddings=8),
        "elsewhere": Variant(tiny().to("meta")),
    }
    arms = {arm.name: arm for arm in Experiment("x", control=MODEL, candidates=candidates, workload=WORK).arms()}
    assert arms["threads"].variant is not None
    assert arms["threads"].variant.transforms == (THREADS,)
    assert arms["plan"].problem == f"the plan was made for model m, the control is {fingerprint_of_model()}"
    assert arms["other"].unjudged is None
    assert "both models are in memory: 313 kB and 313 kB" in arms["other"].notes[0]
    assert "another tokenizer (a vocabulary of 100, the control's 256)" in str(arms["narrow"].unjudged)
    assert "no room for 4 new ones" in str(arms["short"].problem)
    assert "is on meta, the control's on cpu" in str(arms["elsewhere"].problem)
    prints = [arm.fingerprint for arm in arms.values()]
    assert len({p for p in prints if "could not" not in p}) == 4


def test_a_policy_is_tuned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def tune(model: Any, work: Any, policy: Any, **options: Any) -> SimpleNamespace:
        asked.append((is_same(model, MODEL), work, policy.name, policy.budget_s))
        return SimpleNamespace(variant=Variant(model, None, work).with_transform(THREADS), verdict="committed threads")

    monkeypatch.setattr("autotune.tune.run.tune", tune)
    (_, arm) = Experiment("x", control=MODEL, candidates={"a": "lossless"}, workload=WORK).arms()
    assert asked == [(True, WORK, "lossless", policies.load("lossless").budget_s)]
    assert (arm.problem, arm.notes) == (None, ("committed threads",))
    assert arm.description == "policy lossless: LlamaForCausalLM, threads(count=1)@both"


def fingerprint_of_model() -> str:
    from autotune.tune.fingerprint import of_model

    return of_model(MODEL)


def test_without_room_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autotune.machine import device as devices
    from autotune.machine.device import Memory

    MODEL.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(type(devices.of("cpu")), "memory", lambda self: Memory(free=1000, used=0, peak=0))
    (_, arm) = Experiment("x", control=MODEL, candidates={"a": tmp_path / "other"}, workload=WORK).arms()
    assert "both models must be in memory at once" in str(arm.problem)
    assert "1.00 kB are free on cpu" in str(arm.problem)


def test_fingerprints_follow_weights_and_transforms() -> None:
    edited = Variant(MODEL)
    with torch.no_grad():
        edited.edit("both")[0].lm_head.weight = torch.nn.Parameter(torch.zeros(256, 64), requires_grad=False)
    found = [Variant(MODEL), Variant(tiny()), Variant(tiny(seed=1)), Variant(MODEL).with_transform(THREADS), edited]
    first, same, *others = map(fingerprint, found)
    assert first == same
    assert len({first, *others}) == 4
