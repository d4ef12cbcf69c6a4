"""Labelled tasks: read, answered, and compared by what changed."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from autotune.check import harness, tasks
from autotune.check.tasks import Suite, Task, at_least, compare, decide, upper_share
from autotune.errors import MeasurementError, WorkloadError
from autotune.validate import Verdict
from autotune.validate.score import Served
from autotune.variant import Variant
from tests.models import token_prompts


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
    ],
)
def test_a_bad_task_names_its_line(tmp_path, line):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": [5], "answer": [6]}\n' + line)
    with pytest.raises(WorkloadError, match=r"line 2|tokenizer"):
        tasks.read(file, None)


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
    seen = {}

    def evaluate(model, tasks, limit, log_samples):
        seen.update(tasks=tasks, out=model.pretrained.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape)
        rows = [{"doc_id": k, "acc": float(k % 2)} for k in range(4)]
        return {"samples": {tasks[0]: rows}}

    fake, adapter = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models.huggingface")
    fake.simple_evaluate = evaluate
    adapter.HFLM = lambda **given: types.SimpleNamespace(**given)
    for name, module in {"lm_eval": fake, "lm_eval.models": fake, "lm_eval.models.huggingface": adapter}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "unavailable", lambda: None)
    found = harness.answer(Variant(model), "arc_easy", tokenizer)
    assert seen == {"tasks": ["arc_easy"], "out": (1, 5)}
    assert found == Suite("lm-eval:arc_easy", (), ("0", "1", "2", "3"), (False, True, False, True))


@pytest.mark.parametrize("found", [{}, {"samples": {"t": []}}, {"samples": {"t": [{"doc_id": 0, "bleu": 0.4}]}}])
def test_a_task_without_right_and_wrong(found):
    with pytest.raises(MeasurementError, match="no outcome"):
        harness.outcomes("t", found)
