"""Two replicas on Ray Serve: a plan is rolled out, a canary is killed under load. `make test-ray` installs Ray first.

The container file and the manifest are read where nothing can build or apply them.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml

from autotune.errors import DeviceError, SettingsError
from autotune.serve.rollout.decision import CanaryRules
from examples.ray_serve import environment

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ray_serve"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a session with two replicas came to: see ray_session."""
    pytest.importorskip("ray", reason="make test-ray installs it")
    from autotune.runtime import kernels
    from autotune.runtime.kernels import build
    from autotune.serve.run import listen
    from tests.models import tiny, tiny_tokenizer

    if (reason := kernels.available()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("ray")
    own = folder / "cache" / "kernels"
    own.mkdir(mode=0o700, parents=True)
    shutil.copy(build.load(), own)  # compiled before, not while the canary verifies
    tiny("llama").save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "AUTOTUNE_MODEL": str(folder / "tiny"),
        "AUTOTUNE_POLICY": "none",
        "AUTOTUNE_CPUS": "1",
        "AUTOTUNE_REPLICAS": "2:2",
        "AUTOTUNE_CACHE_DIR": str(folder / "cache"),
        # so that a few hundred answers of a tiny model on a busy machine decide
        "AUTOTUNE_CANARY": json.dumps({"slower": 1.0, "again_s": 5.0}),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.serve.ray_session", str(port)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    return json.loads(line)


@pytest.mark.slow
def test_a_plan_is_rolled_out_by_a_canary_under_load(found: dict[str, Any]) -> None:
    assert found["first"]["state"] == "promoted", found["first"]
    assert "within every limit" in found["first"]["reason"]
    assert found["first"]["candidate"]["failures"]["n"] > 50
    assert found["first"]["control"]["failures"]["n"] > 50
    assert found["followed"]
    assert len(found["answered"]) == 2


@pytest.mark.slow
def test_requests_that_begin_alike_meet_on_one_replica_and_a_flood_is_spread(found: dict[str, Any]) -> None:
    met = found["met"]
    assert met["alone"] == 1
    assert met["gained"] == met["total"] >= 7 * 128  # tokens: all but the first request found its first part
    assert len(met["flood"]) == 2
    assert min(met["flood"].values()) >= 10


@pytest.mark.slow
def test_a_canary_that_is_killed_under_load_loses_nothing_and_is_rolled_back(found: dict[str, Any]) -> None:
    assert found["wrong"] == []
    assert found["since"] > 200
    assert (found["before"], found["was_replica"], found["new"]) == (2, True, 1)
    assert found["second"]["reason"] == "the canary's process ended"
    assert found["promoted"] in found["serving"]
    assert set(found["serving"]) <= {found["promoted"], None}  # the new replica has yet to verify it


@pytest.mark.slow
def test_a_stream_of_a_replica_that_is_killed_breaks_off_with_an_error(found: dict[str, Any]) -> None:
    """The others are whole and the model's own, as `wrong` says, to which streams that end in silence count, too."""
    assert found["wrong"] == []
    assert found["streamed"] > 20
    assert 1 <= len(found["broken"]) <= 6  # of as many clients
    assert found["errors"] == ["replica_lost"]


HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM = HEAD | {"headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
PART = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
END = {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize(
    ("replicas", "sent"),
    [
        ([[[STREAM, PART], [PART, END]]], [STREAM, PART, PART, END]),
        ([[[HEAD, END]]], [HEAD, END]),
        ([["dies"], ["dies"], [[STREAM, PART], [END]]], [STREAM, PART, END]),
        ([["dies"], [[HEAD, END]]], [HEAD, END]),
        ([[[STREAM, PART], [PART], "dies"], [[STREAM, END]]], [STREAM, PART, PART, "lost"]),  # nobody begins it again
        ([["dies"], [[STREAM, PART], "dies"], [[STREAM, END]]], [STREAM, PART, "lost"]),
        ([[[STREAM, PART], [END], "dies"]], [STREAM, PART, END]),
        ([[[HEAD], "dies"], [[HEAD, END]]], [HEAD, "raises"]),
        ([["dies"]] * 6, ["raises"]),
    ],
)
def test_the_front_asks_another_replica_or_says_that_a_stream_broke_off(replicas: list[Any], sent: list[Any]) -> None:
    pytest.importorskip("ray", reason="make test-ray installs it")
    from ray.exceptions import RayActorError

    from examples.ray_serve import front

    class Answer:
        def __init__(self, batches: list[Any]) -> None:
            self.batches = batches

        async def __aiter__(self) -> Any:
            for batch in self.batches:
                if batch == "dies":
                    raise RayActorError
                yield batch

        def cancel(self) -> None: ...

    to_come = iter(replicas)
    models = SimpleNamespace(remote=lambda *given, key: Answer(next(to_come)))
    found = list[Any]()

    async def send(message: Any) -> None:
        found.append("lost" if message.get("body") == front.LOST else message)

    try:
        asyncio.run(front._relay(models, {"method": "GET"}, b"", send))
    except RayActorError:
        found.append("raises")
    assert found == sent
    assert b'"code":"replica_lost"' in front.LOST
    assert [json.loads(line[6:]) for line in front.LOST.split(b"\n") if line.startswith(b"data: {")]


@pytest.mark.parametrize(("size", "in_loop"), [(16 * 2**10, True), (16 * 2**10 + 1, False)])
def test_the_front_reads_a_large_body_in_a_thread(size: int, in_loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="make test-ray installs it")
    from examples.ray_serve import front

    threads = list[int]()
    monkeypatch.setattr(front, "beginning", lambda body: threads.append(threading.get_ident()) or f"{len(body)} bytes")
    assert asyncio.run(front._beginning(b" " * size)) == f"{size} bytes"
    assert (threads == [threading.get_ident()]) == in_loop


def test_a_replica_whose_device_is_dead_fails_its_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="make test-ray installs it")
    from autotune.machine import device
    from examples.ray_serve.app import Model

    replica, found = SimpleNamespace(served=SimpleNamespace(model="a model")), mock.Mock()
    monkeypatch.setattr(device, "of", found)
    asyncio.run(Model.func_or_class.check_health(replica))  # type: ignore[attr-defined]
    found.assert_called_once_with("a model")
    found.return_value.check.side_effect = DeviceError("the device is dead")
    with pytest.raises(DeviceError):
        asyncio.run(Model.func_or_class.check_health(replica))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("key", "canary", "busy", "goes_home"),
    [
        ("key", False, 8, True),
        ("key", False, 9, False),
        ("key", True, 8, False),  # the canary and the others are to get the same kinds
        (None, False, 8, False),
    ],
)
def test_the_router_sends_a_beginning_home_unless_there_is_a_canary(
    key: str | None, canary: bool, busy: int, goes_home: bool
) -> None:
    pytest.importorskip("ray", reason="make test-ray installs it")
    from examples.ray_serve.affinity import ranked
    from examples.ray_serve.router import SPARE, PrefixRouter

    home, other = ranked("key", {"one": 0, "two": 0}, SPARE)
    lengths = {home: busy, other: 0}
    replicas: Any = [
        SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats={"canary": canary and name == other})
        for name in (home, other)
    ]
    cache = SimpleNamespace(get=lambda replica: lengths[replica.unique_id])
    router: Any = SimpleNamespace(replica_queue_len_cache=cache, _spare=SPARE)
    asked: Any = SimpleNamespace(kwargs={"key": key}, routing_context=SimpleNamespace(should_backoff=False))
    order = asyncio.run(PrefixRouter.choose_replicas(router, replicas, asked))
    names = [replica.replica_id.unique_id for (replica,) in order]
    assert names == ([home, other] if goes_home else [other, home])
    assert asked.routing_context.should_backoff


def variables() -> set[str]:
    """Names of the environment that the example reads."""
    found = set(re.findall(r'"(AUTOTUNE_[A-Z_]+)"', (EXAMPLE / "environment.py").read_text()))
    return found | {"AUTOTUNE_API_KEY", "AUTOTUNE_CACHE_DIR"}  # which autotune itself reads


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
    told = config["applications"][0]["runtime_env"]["env_vars"]  # also where Ray imports the app, perhaps on the head
    assert {"AUTOTUNE_MODEL", "AUTOTUNE_CPUS", "AUTOTUNE_REPLICAS"} <= set(told) <= variables()
    assert all(isinstance(value, str) for value in told.values())
    assert int(worker["resources"]["limits"]["cpu"]) % environment.cpus(told) == 0
    fewest, most = environment.replicas(told)
    (group,) = cluster["workerGroupSpecs"]
    each_holds = int(worker["resources"]["limits"]["cpu"]) // environment.cpus(told)
    assert (fewest, most) == (each_holds * group["minReplicas"], each_holds * group["maxReplicas"])
    assert "AUTOTUNE_API_KEY" not in told  # everybody reads a configuration
    key = next(each for each in worker["env"] if each["name"] == "AUTOTUNE_API_KEY")
    assert "value" not in key
    assert set(key["valueFrom"]["secretKeyRef"]) == {"name", "key"}  # not optional: without it no pod begins


def test_a_replica_is_set_up_by_its_environment() -> None:
    given = {
        "AUTOTUNE_MODEL": "some/model",
        "AUTOTUNE_NAME": "chat",
        "AUTOTUNE_POLICY": "none",
        "AUTOTUNE_API_KEY": "key-1",
        "AUTOTUNE_DEADLINE": "2.5",
        "AUTOTUNE_MAX_PROMPT": "100",
        "AUTOTUNE_LOG_LEVEL": "warning",
        "AUTOTUNE_CANARY": '{"slower": 0.3}',
        "AUTOTUNE_CPUS": "3",
        "AUTOTUNE_REPLICAS": "2:8",
    }
    assert set(given) | {"AUTOTUNE_CACHE_DIR"} == variables()
    found = environment.settings(given)
    assert (found.model, found.name, found.policy, found.keys) == ("some/model", "chat", None, ("key-1",))
    assert (found.deadline_s, found.longest, found.log_level) == (2.5, 100, "warning")
    assert found.rollout == CanaryRules(slower=0.3)
    assert (environment.cpus(given), environment.replicas(given)) == (3, (2, 8))
    plain = environment.settings({"AUTOTUNE_MODEL": "some/model"})
    assert (plain.keys, plain.log_level, plain.deadline_s, plain.rollout) == ((), "info", None, CanaryRules())
    assert plain.policy is not None


@pytest.mark.parametrize(("name", "value"), [("AUTOTUNE_API_KEY", ""), ("AUTOTUNE_LOG_LEVEL", "loud")])
def test_a_replica_with_an_odd_environment_does_not_begin(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        environment.settings({"AUTOTUNE_MODEL": "some/model", name: value})


def test_the_app_takes_all_its_settings_from_there() -> None:
    tree = ast.parse((EXAMPLE / "app.py").read_text())
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "environment.settings(os.environ)" in calls
    assert "prepared(settings)" in calls
    assert "logs.install(settings.log_level, 'autotune')" in calls
    assert not re.findall(r"environ\.get|Settings\(", (EXAMPLE / "app.py").read_text())


def test_replicas_scale_have_their_own_cores_and_are_looked_after() -> None:
    tree = ast.parse((EXAMPLE / "app.py").read_text())
    (replica,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    (deployment,) = (each for each in replica.decorator_list if isinstance(each, ast.Call))
    said = {each.arg: ast.unparse(each.value) for each in deployment.keywords}
    assert said["ray_actor_options"] == "{'num_cpus': CPUS}"
    assert "'min_replicas': FEWEST, 'max_replicas': MOST" in said["autoscaling_config"]
    assert "request_router_class=PrefixRouter" in said["request_router_config"]
    assert int(said["health_check_period_s"]) > 0
    calls = [ast.unparse(node) for node in ast.walk(replica) if isinstance(node, ast.Call)]
    assert {"torch.set_num_threads(CPUS)", "device.of(self.served.model).check()"} <= set(calls)
    assert "check_health" in {each.name for each in replica.body if isinstance(each, ast.AsyncFunctionDef)}


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
