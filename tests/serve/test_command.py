"""`autotune serve` as its user runs it: a process that loads, answers, and ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from autotune.transforms.lean_loop import LeanLoop
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.plan import Plan, dumps
from tests.models import tiny, tiny_tokenizer
from tests.serve.servers import until


def test_a_process_serves_and_ends_in_order(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-m", "autotune", "serve", str(tmp_path / "tiny"), "--untuned", "--port", "0"]
    environment = os.environ | {"AUTOTUNE_API_KEY": "key"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if '"serving"' in line)
            url, name = json.loads(line)["url"], json.loads(line)["serving"]
            assert name == "tiny"
            headers = {"X-API-Key": "key"}
            until(lambda: httpx.get(f"{url}/readyz", headers=headers).status_code == 200)
            asked = {"model": name, "prompt": "hi", "max_tokens": 4, "temperature": 0}
            answer = httpx.post(f"{url}/v1/completions", json=asked, headers=headers, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] <= 4
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert '"ending": "SIGTERM"' in rest
    assert "Traceback" not in rest
    assert '"key"' not in rest


def test_a_plan_that_cannot_be_used_is_told_before_anything_is_served(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    other = Plan(Fingerprint("another", "", {}, "", "", "strict"), (LeanLoop(),))
    (tmp_path / "plan.json").write_text(dumps(other))
    (tmp_path / "broken.json").write_text("{")
    for file, more, said in [
        ("plan.json", [], "the plan was made for model another"),
        ("plan.json", ["--untuned"], "--plan and --untuned exclude each other"),
        ("broken.json", [], "broken.json"),
        ("none.json", [], "cannot be read"),
    ]:
        command = ["serve", str(tmp_path / "tiny"), "--plan", str(tmp_path / file), "--port", "0", *more]
        done = subprocess.run(
            [sys.executable, "-m", "autotune", *command], capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stderr
        assert said in done.stderr
