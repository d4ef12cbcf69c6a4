"""The options of `autotune serve`: what they come to, and which exclude each other."""

from __future__ import annotations

import importlib
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from autotune.cli import main, parser
from autotune.cli.serve import settings_of
from autotune.errors import SettingsError, UnsupportedModelError
from autotune.model import load as loading
from autotune.serve import run, traces
from autotune.serve.refusal import retry_after
from autotune.serve.run import Settings, check_certificate, use_template
from autotune.serve.service import UNSETTLED
from autotune.transforms.lean_loop import LeanLoop
from autotune.tune import run as tuning
from autotune.tune.plan import dumps
from tests.live.test_adopt import made_for, verdicts  # noqa: F401 - a fixture
from tests.models import tiny, tiny_tokenizer
from tests.serve.servers import running, until

USAGE = 4


def found(*arguments: str, **environment: str) -> Settings:
    return settings_of(parser().parse_args(["serve", "some/model", *arguments]), environment)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ([], "host", "127.0.0.1"),
        (["--host", "0.0.0.0"], "host", "0.0.0.0"),
        ([], "port", 8000),
        (["--port", "0"], "port", 0),
        ([], "keys", ()),
        (["--api-key", "a", "--api-key", "b"], "keys", ("a", "b")),
        ([], "longest", None),
        (["--max-prompt", "9"], "longest", 9),
        ([], "deadline_s", None),
        ([], "drain_s", 30),
        (["--drain", "5"], "drain_s", 5),
        ([], "plan", None),
        ([], "name", None),
        (["--name", "a"], "name", "a"),
        (["--served-model-name", "a", "--served-model-name", "b"], "aliases", ["b"]),
        (["--queue", "3"], "most_waiting", 3),
        ([], "most_waiting", None),
        (["--deadline", "0.5"], "deadline_s", 0.5),
        (["--deadline", "30"], "deadline_s", 30.0),
        (["--dtype", "bfloat16"], "dtype", torch.bfloat16),
        ([], "dtype", None),
        (["--revision", "v2"], "revision", "v2"),
        ([], "keep_alive_s", 75),
        (["--keep-alive", "5"], "keep_alive_s", 5),
        (["--log-level", "error"], "log_level", "error"),
        (["--untuned"], "policy", None),
        (["--ssl-certfile", "c", "--ssl-keyfile", "k"], "tls", (Path("c"), Path("k"))),
        (["--ssl-certfile", "c"], "tls", (Path("c"), None)),
        ([], "tls", None),
    ],
)
def test_what_an_option_comes_to(arguments: list[str], name: str, value: Any) -> None:
    assert getattr(found(*arguments), name) == value


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a\nb\n")
    assert found("--api-key-file", str(tmp_path / "keys"), AUTOTUNE_API_KEY="c").keys == ("a", "b")
    assert found(AUTOTUNE_API_KEY="c").keys == ("c",)


def test_a_policy_is_chosen_unless_nothing_is_tried() -> None:
    assert found().policy.name == found("--tune").policy.name == "throughput"
    assert found("--tune", "--policy", "latency").policy.name == "latency"
    assert found("--max-body", "1000").limits.body_bytes == 1000
    assert found("--write-timeout", "0.5").limits.write_s == 0.5
    assert (found().limits.body_bytes, found().limits.write_s) == (4 * 2**20, 60.0)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--untuned", "--policy", "latency"], {}, "--policy and --untuned exclude each other"),
        (["--untuned", "--tune"], {}, "not allowed with argument"),
        (["--ssl-keyfile", "k"], {}, "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile", "no/such/file"], {}, "the certificate no/such/file cannot be used"),
        (["--chat-template", "no/such/file"], {}, "--chat-template no/such/file cannot be read"),
        (["--deadline", "0"], {}, "seconds above 0"),
        (["--deadline", "nan"], {}, "seconds above 0"),
        (["--queue", "0"], {}, "1 to 256"),
        (["--queue", "257"], {}, "1 to 256"),
        (["--dtype", "int8"], {}, "invalid choice"),
        (["--log-level", "loud"], {}, "invalid choice"),
        ([], {"WORLD_SIZE": "2"}, "WORLD_SIZE is 2"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_loaded(
    arguments: list[str],
    environment: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "load", lambda *_, **__: pytest.fail("it was loaded"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        code: Any = main(["serve", "some/model", "--port", "0", *arguments])
    except SystemExit as end:
        code = end.code
    assert code == USAGE
    assert said in capsys.readouterr().err


def test_one_rank_serves() -> None:
    assert found(WORLD_SIZE="1").model == "some/model"


def test_a_revision_reaches_the_hub_and_only_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[dict[str, Any]]()

    def config(where: str, options: dict[str, Any]) -> Any:
        asked.append(options)
        raise UnsupportedModelError("enough")

    monkeypatch.setattr(loading, "_config", config)
    monkeypatch.setattr(loading, "_offline", lambda: True)
    for revision in ("v2", None):
        with pytest.raises(UnsupportedModelError, match="enough"):
            loading.load("some/model", revision=revision)
    assert [options.get("revision") for options in asked] == ["v2", None]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="has no revisions"):
        loading.load(tmp_path, revision="v2")


def test_a_chat_template_is_tried_before_it_is_used() -> None:
    tokenizer = tiny_tokenizer()
    use_template(tokenizer, "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "y"}], tokenize=False) == "<y>"
    for wrong in ("{% for %}", "{{ raise_exception('no') }}", "{{ messages.nothing.at.all }}"):
        with pytest.raises(SettingsError, match="the chat template cannot render a message"):
            use_template(tiny_tokenizer(), wrong)


def test_options_reach_the_model_and_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "configured", lambda name: f"traces of {name}")
    tiny("llama").save_pretrained(tmp_path / "tiny-0.5B")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny-0.5B")
    (tmp_path / "template").write_text("{% for m in messages %}({{ m.content }}){% endfor %}")
    arguments = ["--untuned", "--dtype", "float16", "--chat-template", str(tmp_path / "template"), "--queue", "3"]
    arguments += ["--max-body", "99", "--name", "a", "--name", "b"]
    arguments += ["--max-prompt", "50", "--deadline", "3", "--api-key", "k"]
    args = parser().parse_args(["serve", str(tmp_path / "tiny-0.5B"), *arguments])
    served = run.prepared(settings_of(args, {}))
    assert served.model.dtype == torch.float16
    assert served.prompts.tokenizer.chat_template.startswith("{% for m in messages %}(")
    assert (served.answers.most_waiting, served.limits.body_bytes, served.name) == (3, 99, "a")
    assert (served.prompts.most, served.answers.deadline_s, served.keys, served.aliases) == (50, 3.0, ("k",), ("b",))
    assert (served.untuned, served.answers.traces) == (True, "traces of a")
    assert served.knows(str(tmp_path / "tiny-0.5B"))
    served.model.autotune.unwrap()


def test_the_server_gets_what_the_command_says(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[Any]()

    class Recorded:
        def __init__(self, *given: Any) -> None:
            made.append(given)

        async def run(self, served: Any, listening: socket.socket) -> None:
            with listening:
                made.append((served, listening.getsockname()[0]))

    monkeypatch.setattr(run, "prepared", lambda settings: settings.model)
    monkeypatch.setattr(run, "create_app", lambda served: f"the app of {served}")
    monkeypatch.setattr(run, "Server", Recorded)
    assert main(["serve", "some/model", "--port", "0", "--drain", "7", "--keep-alive", "9"]) == 0
    assert made == [("the app of some/model", 7, 9, None), ("some/model", "127.0.0.1")]


@pytest.mark.parametrize(
    ("missing", "command"),
    [("autotune.serve.run", ["serve", "some/model"]), ("autotune.serve.load", ["bench-serve", "http://127.0.0.1:9"])],
)
def test_without_the_extra_the_command_says_what_to_install(
    missing: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module(missing)
    monkeypatch.delattr(missing)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(command) != 0
    assert 'pip install "autotune-inference[serve]"' in capsys.readouterr().err


@pytest.mark.usefixtures("own_cache", "verdicts")
def test_a_plan_that_is_given_serves_once_it_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_searched", lambda *_: pytest.fail("it is tuned"))
    tiny("llama", max_position_embeddings=4096).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    plan = made_for(loading.load(tmp_path / "tiny")[0], LeanLoop())
    (tmp_path / "plan.json").write_text(dumps(plan))
    args = parser().parse_args(["serve", str(tmp_path / "tiny"), "--plan", str(tmp_path / "plan.json")])
    served = run.prepared(settings_of(args, {}))
    until(lambda: served.model.autotune.status.state not in UNSETTLED)
    assert served.model.autotune.status.transforms == (str(LeanLoop()),)
    assert served.model.autotune.options.policy.name == "throughput"
    assert "re-verifying the plan that was given" in [line.text for line in served.progress.lines()]
    served.model.autotune.unwrap()


def test_a_queue_that_is_full_is_a_429() -> None:
    with running(most_waiting=1) as server:
        body = {"prompt": "hi", "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        server.served.answers.most_waiting = 0
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")


@pytest.mark.parametrize(
    ("waiting", "per_s", "expected"), [(0, 0.0, 60), (0, 2.0, 1), (9, 2.0, 5), (256, 10.0, 26), (256, 0.1, 60)]
)
def test_a_refused_request_may_come_again_when_those_before_it_are_answered(
    waiting: int, per_s: float, expected: int
) -> None:
    assert retry_after(waiting, per_s) == {"Retry-After": str(expected)}


def test_openai_s_client_does_not_repeat_what_missed_its_deadline() -> None:
    with running() as server:
        server.served.answers.deadline_s = 1e-6
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as client,
            pytest.raises(openai.APIStatusError) as raised,
        ):
            client.completions.create(model="tiny", prompt="hi", max_tokens=20)
        assert raised.value.status_code == 408
        line = 'autotune:http_requests_total{route="/v1/completions",status="408"} 1.0'
        assert line in httpx.get(f"{server.url}/metrics").text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_https(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    check_certificate(certificate, key)
    with pytest.raises(SettingsError, match=str(certificate)):
        check_certificate(certificate, None)
    known = ssl.create_default_context(cafile=str(certificate))
    known.check_hostname = False
    with running(tls=(certificate, key)) as server:
        assert httpx.get(server.url.replace("http", "https") + "/livez", verify=known).text == "ok"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/livez")
