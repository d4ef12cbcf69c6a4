"""By which names clients may call the model."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from autotune.serve.run import name_of
from tests.serve.servers import running


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
        ("gpt2", "gpt2"),
        ("/models/SmolLM2-1.7B", "SmolLM2-1.7B"),
        ("/models/SmolLM2-1.7B/", "SmolLM2-1.7B"),
        ("models/../models/v0.3", "v0.3"),
        ("/models/smollm2-q8_0.gguf", "smollm2-q8_0"),
        ("llama-3.2.Q4_K_M.gguf", "llama-3.2.Q4_K_M"),
        ("/", "/"),
    ],
)
def test_a_model_s_own_name_keeps_its_dots(model: str, name: str) -> None:
    assert name_of(model) == name


def test_a_folder_that_is_here_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of(".") == tmp_path.name


def test_aliases_and_the_name_as_given_are_known_and_only_aliases_listed() -> None:
    with running(name="small", aliases=["chat", "default"], given="owner/small-1.5") as server:
        listed = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [card["id"] for card in listed] == ["small", "chat", "default"]
        for name, status in [
            ("small", 200),
            ("chat", 200),
            ("owner/small-1.5", 200),
            ("owner/small", 404),
            ("small-1.5", 404),
        ]:
            body = {"model": name, "prompt": [5], "max_tokens": 1}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == status
            found = httpx.get(f"{server.url}/v1/models/{name}")
            assert found.status_code == status
            assert status == 404 or found.json()["id"] == name
        error = found.json()["error"]["message"]
        assert error == "no model 'small-1.5' here; this server has 'small', 'chat', 'default'"
