"""`autotune check` from the outside: exit codes, files, and one line for what is wrong."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as Xml

import pytest
import torch

from autotune import cli, transforms
from autotune.tune.plan import Trial, TrialOutcome
from tests.compare.check.conftest import subject
from tests.models import token_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, one_thread: None) -> Path:
    """Models, prompts, tasks, and a baseline that the command recorded."""
    work = tmp_path_factory.mktemp("command")
    models = {"model": subject(), "broken": subject(), "wide": subject(vocab_size=300)}
    with torch.no_grad():
        models["broken"].model.layers[1].mlp.down_proj.weight.mul_(3)
    for name, model in models.items():
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    (work / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in token_prompts(18, 40)))
    (work / "tuned.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in token_prompts(2, 40)))
    (work / "tasks.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 1}')
    made = ["--prompts", work / "prompts.jsonl", "--tasks", work / "tasks.jsonl", "--out", work / "base"]
    assert cli.main(["check", "record", str(work / "model"), "--no-latency", *map(str, made)]) == 0
    (work / "torn").mkdir()
    for file in (work / "base").iterdir():
        (work / "torn" / file.name).write_bytes(file.read_bytes()[:-1])
    (work / "foreign").mkdir()
    (work / "foreign" / "manifest.json").write_text('{"kind": "shopping list"}')
    return work


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ("run {work}/model --baseline {work}/base", 0),
        ("run {work}/broken --baseline {work}/base", 1),
        ("run {work}/model --baseline {work}/base --tuned-on {work}/tuned.jsonl", 2),
        ("run {work}/model --baseline {work}/torn", 3),
        ("run {work}/model --baseline {work}/foreign", 4),
        ("run {work}/model --baseline {work}/nothing", 4),
        ("run {work}/wide --baseline {work}/base", 4),
        ("run {work}/nothing --baseline {work}/base", 4),
        ("run {work}/model --baseline {work}/base --plan {work}/tasks.jsonl", 4),
        ("run {work}/model --baseline {work}/base --tuned-on {work}/nothing", 4),
        ("run {work}/model --baseline {work}/base --prompts {work}/tuned.jsonl", 4),
        ("record {work}/model --out {work}/base", 4),
        ("record {work}/model --out {work}/model", 4),
        ("record {work}/model --out {work}/new --prompts {work}/tuned.jsonl --no-latency", 4),
        ("record {work}/model --out {work}/new --tasks {work}/nothing", 4),
    ],
)
def test_exit_codes(work, argv, code, capsys):
    found = cli.main(["check", *argv.format(work=work).split(), *(["--no-latency"] if "run" in argv else [])])
    said = capsys.readouterr()
    assert found == code, said.out + said.err
    errors = [line for line in said.err.splitlines() if line.startswith("autotune: ")]
    assert len(errors) == (1 if code > 2 else 0)
    if code <= 2:
        assert f"\n{['PASS', 'FAIL', 'INCONCLUSIVE'][code]}: " in said.out
    assert not (work / "new").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--max-slowdown 1%", "latency cannot be checked, because it was not recorded"),
        ("--against {work}/broken", "the model to measure against is not the one recorded"),
    ],
)
def test_latency_that_was_asked_for_is_not_left_out(work, options, said, capsys):
    argv = f"check run {work}/model --baseline {work}/base {options.format(work=work)}"
    assert cli.main(argv.split()) == cli.USAGE
    assert said in capsys.readouterr().err


def test_what_a_baseline_lacks_is_said_before_a_model_is_loaded(work, capsys):
    argv = f"check run no/such/model --baseline {work}/base --max-slowdown 1%"
    assert cli.main(argv.split()) == cli.USAGE
    assert "latency cannot be checked" in capsys.readouterr().err


POLICY = """
name = "quick"
description = "Nothing that could win on any machine"
objective = "latency"
tier = "lossless"
budget_s = 30
[[steps]]
name = "threads"
when = { phase = "decode", device = ["cuda"] }
choices = [{ transform = "threads", count = 1, phase = "decode" }]
"""


@pytest.mark.slow
def test_a_policy_is_tuned_with_first_on_other_prompts(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    (tmp_path / "quick.toml").write_text(POLICY)
    others = tmp_path / "others.jsonl"
    others.write_text("\n".join(json.dumps({"prompt": p}) for p in token_prompts(18, 40, seed=8)))
    command = ["check", "run", work / "model", "--baseline", work / "base", "--no-latency"]
    tuned = ["--policy", tmp_path / "quick.toml", "--tuned-on", others]
    assert cli.main(list(map(str, command + tuned))) == 0
    assert "none of the 18" in " ".join(capsys.readouterr().out.split())


def test_a_policy_of_which_nothing_could_be_tried_is_not_checked(work, tmp_path, monkeypatch, capsys):
    """The model as it is would pass under the policy's name."""
    tried = Trial(transforms.make("threads", {"count": 1}), "step", "decode", TrialOutcome.ERROR, "why")

    def tune(model, work, policy, **_):
        return SimpleNamespace(plan=SimpleNamespace(trials=(tried,)), verdict="kept the original, but ...")

    monkeypatch.setattr("autotune.tune.run.tune", tune)
    others = tmp_path / "others.jsonl"
    others.write_text("\n".join(json.dumps({"prompt": p}) for p in token_prompts(18, 40, seed=8)))
    command = ["check", "run", work / "model", "--baseline", work / "base", "--no-latency"]
    tuned = ["--policy", "balanced", "--tuned-on", others]
    assert cli.main(list(map(str, command + tuned))) == 3
    assert "autotune: kept the original, but ...\n" in capsys.readouterr().err


def test_files_for_ci(work, tmp_path, capsys):
    names = {kind: tmp_path / "out" / f"result.{kind}" for kind in ("json", "junit", "markdown")}
    options = [word for kind, file in names.items() for word in (f"--{kind}", str(file))]
    base = ["check", "run", str(work / "broken"), "--baseline", str(work / "base"), "--no-latency", *options]
    assert cli.main(base) == 1
    data = json.loads(names["json"].read_text())
    assert (data["verdict"], data["exit_code"]) == ("fail", 1)
    assert data["localised"]["first_layer"] == "model.layers.1"
    assert data["localised"]["prompts"][0]["text"]
    root = Xml.parse(names["junit"]).getroot()
    assert {case.get("name") for case in root.iter("testcase")} >= {"quality", "mean KLD", "memory", "tasks"}
    assert "model.layers.1" in names["markdown"].read_text()
    assert "model.layers.1" in capsys.readouterr().out
    assert {stat.S_IMODE(file.stat().st_mode) for file in names.values()} == {0o600}


@pytest.mark.parametrize(
    "argv",
    [
        ["check"],
        ["check", "compare"],
        ["check", "record", "m"],
        ["check", "run", "m"],
        ["check", "run", "m", "--baseline", "b", "--tier", "perfect"],
        ["check", "run", "m", "--baseline", "b", "--max-slowdown", "much"],
        ["check", "run", "m", "--baseline", "b", "--max-slowdown", "-5%"],
        ["check", "run", "m", "--baseline", "b", "--plan", "p", "--policy", "q"],
        ["check", "run", "m", "--baseline", "b", "--against", "n", "--no-latency"],
        ["check", "record", "m", "--out", "b", "--size", "huge"],
    ],
    ids=" ".join,
)
def test_what_argparse_refuses_is_a_usage_error(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == cli.USAGE


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0), ("150%", 1.5)])
def test_fractions(text, share):
    assert cli.fraction(text) == pytest.approx(share)
