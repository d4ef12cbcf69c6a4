"""The example runs as its reader would run it, and the workflow calls commands that exist."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from autotune import cli
from tests.compare.check.conftest import subject
from tests.models import token_prompts

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.slow
def test_the_example_finds_what_it_damaged(tmp_path, tokenizer):
    subject().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in token_prompts(18, 40)))
    options = ["--model", tmp_path / "model", "--prompts", tmp_path / "prompts.jsonl"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quality_check.py", *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, third = done.stdout.splitlines()
    assert first.startswith("pass: ")
    assert second.startswith("fail: ")
    assert third == "model.layers.0.mlp.down_proj.weight was damaged, model.layers.0 was found"


def test_the_workflow_calls_commands_that_exist():
    file = EXAMPLES / "ci" / "quality-check.yml"
    steps = yaml.safe_load(file.read_text())["jobs"]["check"]["steps"]
    (command,) = [step["run"] for step in steps if "autotune check run" in step.get("run", "")]
    args = cli.parser().parse_args(shlex.split(command)[1:])
    assert (args.command, args.action, args.tier) == ("check", "run", "strict")
    (told,) = [line.strip("# ") for line in file.read_text().splitlines() if "autotune check record" in line]
    assert cli.parser().parse_args(shlex.split(told)[1:]).action == "record"
