"""Replicas on Ray Serve: one of them is killed under load. `make test-ray` installs Ray first.

The container file and the manifest are read where nothing can build or apply them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ray_serve"
SCRIPT = """
import json, os, signal, sys, threading, time
import openai, psutil, ray, torch
from ray import serve
from examples.ray_serve.app import app
from tests.models import tiny, tiny_tokenizer, token_prompts

def replicas():
    named = ((each.pid, " ".join(each.info["cmdline"] or [])) for each in psutil.process_iter(["cmdline"]))
    return {pid for pid, command in named if command.startswith("ray::ServeReplica:autotune:Model")}

ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(app, name="autotune")
client = openai.OpenAI(base_url=f"http://127.0.0.1:{sys.argv[1]}/v1", api_key="none", max_retries=8)
model, tokenizer, prompts = tiny("llama"), tiny_tokenizer(), token_prompts(6)
expected = []
for prompt in prompts:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected.append(tokenizer.decode(out[0, len(prompt):], skip_special_tokens=True))
name, wrong, answered, over = client.models.list().data[0].id, [], [], threading.Event()

def ask():
    while not over.is_set():
        for prompt, right in zip(prompts, expected):
            try:
                got = client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0).choices[0].text
                answered.append(time.monotonic())
                if got != right:
                    wrong.append(got)
            except Exception as error:
                wrong.append(repr(error)[:300])

threads = [threading.Thread(target=ask) for _ in range(4)]
[thread.start() for thread in threads]
def until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
until(lambda: len(answered) > 100)
before = replicas()
os.kill(min(before), signal.SIGKILL)
killed = time.monotonic()
until(lambda: len(replicas()) == 2 and min(before) not in replicas())
until(lambda: sum(at > killed for at in answered) > 200)
over.set()
[thread.join() for thread in threads]
after = replicas()
print(json.dumps({"before": len(before), "after": len(after), "new": len(after - before), "wrong": wrong[:5],
                  "since": sum(at > killed for at in answered)}))
serve.shutdown()
"""


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="make test-ray installs it")
    from autotune.serve.run import listen
    from tests.models import tiny, tiny_tokenizer

    tiny("llama").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "AUTOTUNE_MODEL": str(tmp_path / "tiny"),
        "AUTOTUNE_POLICY": "none",
        "AUTOTUNE_CPUS": "1",
        "AUTOTUNE_REPLICAS": "2:2",
        "AUTOTUNE_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", SCRIPT, str(port)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"before"')))
    assert found["wrong"] == [], done.stderr[-2000:]
    assert (found["before"], found["after"], found["new"]) == (2, 2, 1)
    assert found["since"] > 200


def variables() -> set[str]:
    """Names of the environment that the example reads."""
    return set(re.findall(r'"(AUTOTUNE_[A-Z]+)"', (EXAMPLE / "app.py").read_text())) | {"AUTOTUNE_CACHE_DIR"}


def test_the_manifest_names_what_is_there() -> None:
    manifest: Any = yaml.safe_load((EXAMPLE / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    module, _, name = config["applications"][0]["import_path"].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    assigned = {target.id for target in targets if isinstance(target, ast.Name)}
    assert name in assigned
    cluster = manifest["spec"]["rayClusterConfig"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:
        spec = pod["template"]["spec"]
        volumes = {volume["name"] for volume in spec.get("volumes", ())}
        for container in spec["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", ())} == volumes
            assert {each["name"] for each in container.get("env", ())} <= variables()
            assert container["resources"]["requests"] == container["resources"]["limits"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    told = {each["name"]: each["value"] for each in worker["env"]}
    assert int(worker["resources"]["limits"]["cpu"]) % int(told["AUTOTUNE_CPUS"]) == 0


def test_the_container_file_copies_and_installs_what_is_there() -> None:
    text = (EXAMPLE / "Containerfile").read_text()
    copied = [path for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for path in line.split()[:-1]]
    assert copied
    assert all((ROOT / path).exists() for path in copied)
    extras = re.search(r"autotune\[([\w,]+)\]", text)
    assert extras is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.group(1).split(",")) <= set(known)
    version = re.search(r"ray:([\d.]+)-", text)
    assert version is not None
    assert f'rayVersion: "{version.group(1)}"' in (EXAMPLE / "rayservice.yaml").read_text()
    assert set(re.findall(r"(AUTOTUNE_[A-Z]+)=", text)) <= variables()
