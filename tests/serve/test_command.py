"""`autotune serve` as its user runs it: a process that loads, answers, and ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx

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
    assert '{"ending": "SIGTERM"}' in rest
    assert "Traceback" not in rest
    assert '"key"' not in rest
