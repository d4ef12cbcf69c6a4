"""Labelled tasks: read, answered, and compared by what changed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.compare.check import harness, tasks
from autotune.compare.check.tasks import Suite, Task, at_least, compare, decide, upper_share
from autotune.errors import MeasurementError, WorkloadError
from autotune.runtime.variant import Variant
from autotune.validate import Verdict
from autotune.validate.score import Served
from tests.models import EOS, token_prompts


@pytest.mark.parametrize(
    ("lost", "won", "total", "verdict", "said"),
    [
        (0, 0, 100, Verdict.PASS, "the same tasks"),
        (0, 0, 0, Verdict.INCONCLUSIVE, "no tasks"),
        (0, 3, 100, Verdict.PASS, "3 won"),
        (1, 0, 1000, Verdict.PASS, "1 lost"),
        (1, 0, 20, Verdict.INCONCLUSIVE, "need some 100 tasks"),
        (4, 0, 100, Verdict.INCONCLUSIVE, "need some 125 tasks"),
        (5, 0, 100, Verdict.FAIL, "p = 0.031"),
        (40, 20, 200, Verdict.FAIL, "McNemar"),
        (30, 28, 1000, Verdict.PASS, "on balance"),
        (30, 28, 100, Verdict.INCONCLUSIVE, "more than 100 tasks"),
        (700, 500, 5000, Verdict.FAIL, "700 lost"),
    ],
)
def test_what_changed_outcomes_say(lost, won, total, verdict, said):
    found, reason = decide(lost, won, total)
    assert found is verdict, reason
    assert said in reason


def test_equal_accuracy_hides_what_flips_show():
    recorded = Suite("tasks", (), tuple("abcdefgh"), (True,) * 4 + (False,) * 4)
    found = compare(recorded, (False,) * 4 + (True,) * 4)
    assert (found.lost, found.won, found.total) == (("a", "b", "c", "d"), ("e", "f", "g", "h"), 8)


@pytest.mark.parametrize(("lost", "changed", "p"), [(0, 5, 1.0), (5, 5, 1 / 32), (3, 4, 5 / 16)])
def test_mcnemars_exact_p(lost, changed, p):
    assert at_least(lost, changed) == pytest.approx(p)


@pytest.mark.parametrize(("lost", "changed", "share"), [(0, 10, 0.2589), (5, 5, 1.0), (3, 10, 0.6066)])
def test_clopper_pearson(lost, changed, share):
    assert upper_share(lost, changed) == pytest.approx(share, abs=1e-4)  # published tables, one-sided 95 %


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[1]",
        '{"prompt": [5]}',
        '{"prompt": [5], "answer": ""}',
        '{"prompt": [5], "answer": 3}',
        '{"prompt": [5], "choices": [[6]], "answer": 0}',
        '{"prompt": [5], "choices": [[6], [7]], "answer": 2}',
        '{"prompt": [5], "choices": [[6], [7]], "answer": true}',
        '{"prompt": "text", "answer": "needs a tokenizer"}',
        '{"prompt": "", "answer": [6]}',
        '{"prompt": [], "answer": [6]}',
        '{"prompt": null, "answer": [6]}',
        '{"prompt": 5, "answer": [6]}',
        '{"prompt": {"a": 1}, "answer": [6]}',
        '{"prompt": [5, "x"], "answer": [6]}',
        '{"prompt": [5.5], "answer": [6]}',
        '{"prompt": [true], "answer": [6]}',
        '{"prompt": [[5]], "answer": [6]}',
        '{"prompt": [5], "answer": [[6]]}',
        '{"prompt": [5], "answer": ["x"]}',
        '{"prompt": [5], "choices": "ab", "answer": 0}',
        '{"prompt": [5], "choices": [6, 7], "answer": 0}',
        '{"prompt": [5], "choices": [[6], []], "answer": 0}',
        '{"prompt": [5], "choices": [[6], ["x"]], "answer": 0}',
        '{"prompt": [5], "choices": [[6], {"a": 1}], "answer": 0}',
        '{"prompt": [5], "choices": [[6], [7]], "answer": -1}',
        '{"prompt": [5], "choices": [[6], [7]], "answer": "0"}',
        '{"prompt": [-1], "answer": [6]}',
        '{"prompt": [5], "answer": [256]}',
        '{"prompt": [99999999999999999999], "answer": [6]}',
        '{"prompt": [5], "choices": [[6], [256]], "answer": 0}',
        json.dumps({"prompt": [5] * 58, "answer": [6] * 3}),
        json.dumps({"prompt": [5] * 62, "choices": [[6], [7] * 3], "answer": 0}),
        "[" * 100_000,
    ],
    ids=lambda line: line[:50],
)
def test_a_bad_task_names_its_line(tmp_path, line):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": [5], "answer": [6]}\n' + line)
    with pytest.raises(WorkloadError, match="line 2"):
        tasks.read(file, None, vocabulary=256, context=64)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "a\ud800", "answer": "b"},
        {"prompt": "a", "answer": "b\ud800"},
        {"prompt": "a", "answer": "  "},
        {"prompt": "a", "choices": ["b", "\ud800"], "answer": 0},
        {"prompt": "", "answer": "b"},
    ],
)
def test_a_bad_task_in_text_names_its_line(tmp_path, line, tokenizer):
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "2+2 is", "answer": "4"}\n' + json.dumps(line))
    with pytest.raises(WorkloadError, match="line 2"):
        tasks.read(tmp_path / "tasks.jsonl", tokenizer, vocabulary=256, context=64)


@pytest.mark.parametrize("line", [{"prompt": [5] * 57, "answer": [6] * 3}, {"prompt": [0], "answer": [255]}])
def test_what_just_fits_is_read(tmp_path, line):
    (tmp_path / "tasks.jsonl").write_text(json.dumps(line))
    assert len(tasks.read(tmp_path / "tasks.jsonl", None, vocabulary=256, context=64)) == 1


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00" * 10])
def test_a_file_of_no_text_is_no_tasks(tmp_path, content):
    (tmp_path / "tasks.jsonl").write_bytes(content)
    with pytest.raises(WorkloadError, match=r"tasks\.jsonl"):
        tasks.read(tmp_path / "tasks.jsonl", None)


def test_a_file_without_tasks(tmp_path):
    (tmp_path / "tasks.jsonl").write_text("\n")
    with pytest.raises(WorkloadError, match="no tasks"):
        tasks.read(tmp_path / "tasks.jsonl", None)


def test_what_the_model_says_is_right_and_anything_else_is_wrong(model, tokenizer):
    prompt = tuple(token_prompts(1, 12)[0])
    said = tuple(Served(Variant(model), 0).generate([prompt], 6)[0, 12:].tolist())
    wrong = tuple((t + 1) % 200 for t in said)
    given = (
        Task(prompt, answer=said[:2]),
        Task(prompt, answer=wrong[:2]),
        Task(prompt, choices=(wrong[:1], said[:1]), index=1),
        Task(prompt, choices=(wrong[:1], said[:1]), index=0),
    )
    assert tasks.answer(Variant(model), given, None) == (True, False, True, False)


@pytest.mark.parametrize(
    ("said", "right"), [("42", True), ("42.", True), ("423", False), ("4", False), (" 42 is", True)]
)
def test_an_answer_as_text_ends_where_it_ends(model, tokenizer, monkeypatch, said, right):
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    task = Task((5, 6), answer=(7,), text="42")
    monkeypatch.setattr(Served, "generate", lambda self, prompts, count: torch.tensor([[5, 6, *ids]]))
    assert tasks.answer(Variant(model), [task], tokenizer) == (right,)


def test_what_follows_the_end_of_an_answer_is_not_the_answer(model, tokenizer, monkeypatch):
    four, two, more = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("4", "2", "7"))
    task = Task((5, 6), answer=(7,), text="42")
    for out, right in (([*four, *two, EOS, *more], True), ([*four, EOS, *two], False)):
        monkeypatch.setattr(Served, "generate", lambda self, prompts, count, out=out: torch.tensor([[5, 6, *out]]))
        assert tasks.answer(Variant(model), [task], tokenizer) == (right,)


def test_text_follows_its_prompt_after_a_space(tmp_path, tokenizer):
    file = tmp_path / "tasks.jsonl"
    lines = [{"prompt": "2+2 is", "answer": "4"}, {"prompt": "so: ", "choices": ["a", "b"], "answer": 1}]
    file.write_text("\n".join(map(json.dumps, lines)))
    first, second = tasks.read(file, tokenizer)
    assert (tokenizer.decode(first.answer), first.text) == (" 4", "4")
    assert [tokenizer.decode(choice) for choice in second.choices] == ["a", "b"]


def test_the_harness_where_it_is_not_installed(model, tokenizer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install lm-eval" in str(harness.unavailable())
    with pytest.raises(MeasurementError, match="not installed"):
        harness.answer(Variant(model), "arc_easy", tokenizer)


def test_the_harness_is_given_a_model_that_serves(model, tokenizer, monkeypatch):
    seen: dict[str, Any] = {}

    def evaluate(model, tasks, limit, log_samples):
        seen.update(tasks=tasks, out=model.pretrained.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape)
        rows = [{"doc_id": k, "filter": "none", "acc": float(k % 2)} for k in range(4)]
        return {"samples": {tasks[0]: rows}}

    fake: Any = types.ModuleType("lm_eval")
    adapter: Any = types.ModuleType("lm_eval.models.huggingface")
    fake.simple_evaluate = evaluate
    adapter.HFLM = lambda **given: types.SimpleNamespace(**given)
    for name, module in {"lm_eval": fake, "lm_eval.models": fake, "lm_eval.models.huggingface": adapter}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "unavailable", lambda: None)
    found = harness.answer(Variant(model), "arc_easy", tokenizer)
    assert seen == {"tasks": ["arc_easy"], "out": (1, 5)}
    ids = tuple(f"arc_easy/none/{k}" for k in range(4))
    assert found == Suite("lm-eval:arc_easy", (), ids, (False, True, False, True))


@pytest.fixture
def real():
    """What lm-evaluation-harness 0.4.13 returned; see tests/fixtures/README.md."""
    return json.loads((Path(__file__).parents[2] / "fixtures" / "lm_eval" / "samples.json").read_text())


def test_every_outcome_of_the_harness_is_kept(real):
    found = harness.outcomes("sums,things", real)
    assert dict(zip(found.ids, found.right, strict=True)) == {
        "sums/strict-match/0": False,
        "sums/strict-match/1": True,
        "sums/strict-match/2": False,
        "sums/flexible-extract/0": True,
        "sums/flexible-extract/1": True,
        "sums/flexible-extract/2": False,
        "colours/none/0": True,
        "colours/none/1": True,
        "shapes/none/0": False,
        "shapes/none/1": False,
    }


def test_a_groups_tasks_are_compared_together_and_filters_apart(real):
    group = harness.outcomes("things", {"samples": {name: real["samples"][name] for name in ("colours", "shapes")}})
    assert harness.by_filter(group) == {"lm-eval:things": (0, 1, 2, 3)}
    filters = harness.outcomes("sums", {"samples": {"sums": real["samples"]["sums"]}})
    assert harness.by_filter(filters) == {
        "lm-eval:sums (strict-match)": (0, 1, 2),
        "lm-eval:sums (flexible-extract)": (3, 4, 5),
    }


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "no outcome"),
        ({"samples": {"t": []}}, "no outcome"),
        ({"samples": {"t": [{"doc_id": 0, "bleu": 0.4}]}}, "no outcome"),
        ({"samples": {"t": [{"doc_id": 0, "acc": 1.0}], "u": [{"doc_id": 0, "bleu": 0.4}]}}, "u has no outcome"),
        ({"samples": {"t": [{"doc_id": 0, "acc": 0.5}]}}, "the acc 0.5"),
        ({"samples": {"t": [{"doc_id": 0, "acc": [1, 0]}]}}, r"the acc \[1, 0\]"),
        ({"samples": {"t": [{"doc_id": 0, "acc": 1.0}, {"doc_id": 0, "acc": 0.0}]}}, "two outcomes for t/none/0"),
    ],
)
def test_a_task_without_right_and_wrong(found, said):
    with pytest.raises(MeasurementError, match=said):
        harness.outcomes("t", found)


@pytest.mark.parametrize(("task", "said"), [("arc_eazy", "did you mean 'arc_easy'"), ("mmlu", None)])
def test_a_task_that_the_harness_does_not_know_is_refused_at_once(task, said, monkeypatch):
    module: Any = types.ModuleType("lm_eval.tasks")
    module.TaskManager = lambda: types.SimpleNamespace(all_tasks=["arc_easy", "mmlu"])
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "unavailable", lambda: None)
    if said is None:
        harness.require([task])
        return
    with pytest.raises(WorkloadError, match=said):
        harness.require(["mmlu", task])
