"""Every example runs, on a tiny model, in a process of its own as its reader would run it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch

from autotune.runtime.variant import Variant
from autotune.tune import policy as policies
from tests.models import ONE_QUESTION, tiny, token_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny model with its tokenizer, and a policy that takes seconds."""
    folder = tmp_path_factory.mktemp("examples")
    tiny().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "quick.toml").write_text(ONE_QUESTION)
    return folder


def run(*command: str | Path, path: Path | None = None) -> str:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_quickstart(folder: Path) -> None:
    said = run(EXAMPLES / "quickstart.py", "--model", folder / "model", "--policy", folder / "quick.toml")
    assert "-bound: " in said
    assert "Status(" in said


@pytest.mark.slow
def test_ab_experiment(folder: Path, tmp_path: Path) -> None:
    options = ("--pairs", "2", "--budget", "5", "--store", tmp_path / "kept.sqlite", "--chart", tmp_path / "chart.svg")
    said = run(EXAMPLES / "ab_experiment.py", "--model", folder / "model", *options)
    assert "Experiment eager-attention, version 1: " in said
    assert "worth a choice: " in said
    assert (tmp_path / "chart.svg").exists()


@pytest.mark.slow
def test_custom_policy(folder: Path) -> None:
    said = run(EXAMPLES / "custom_policy.py", "--model", folder / "model", "--budget", "15")
    assert said.startswith("chat: ")
    assert "weight_storage" in said


def test_the_examples_policy_is_valid() -> None:
    assert policies.load(EXAMPLES / "chat.toml").limits.max_ttft_increase == 0.01


@pytest.mark.slow
def test_custom_transform(folder: Path, tmp_path: Path) -> None:
    source = EXAMPLES / "custom_transform"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    build = tmp_path / "source"  # pip writes build files beside the source
    build.mkdir()
    for name in ("pyproject.toml", "merged_mlp.py"):
        (build / name).write_bytes((source / name).read_bytes())
    run("-m", "pip", "install", *options, "--target", tmp_path / "site", build)
    said = run(source / "run.py", "--model", folder / "model", path=tmp_path / "site")
    assert "found: gate and up projection" in said
    assert ": merged_mlp @ decode: " in said


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_the_custom_transform_computes_the_same(phase: Any) -> None:
    model, prompt = tiny(), torch.tensor(token_prompts(1))
    merged = module(EXAMPLES / "custom_transform" / "merged_mlp.py")
    variant = Variant(model).with_transforms((merged.MergedMLP(phase),))
    assert variant.transforms[0].took_effect(variant) is None
    assert merged.mergeable(model)
    with torch.no_grad():
        torch.testing.assert_close(variant.modules["decode"](prompt).logits, model(prompt).logits)
        torch.testing.assert_close(variant.modules["prefill"](prompt).logits, model(prompt).logits)


def module(path: Path) -> Any:
    name = f"examples.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # pydantic resolves annotations there
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("when", ["blocking", "background"])
def test_serving(folder: Path, tokenizer: PreTrainedTokenizerFast, when: str) -> None:
    model = tiny()
    expected = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=12)[0, 5:]
    serving = module(EXAMPLES / "serving.py")
    app = serving.create_app(model, tokenizer, when=when, policy=str(folder / "quick.toml"))

    async def talk() -> tuple[list[httpx.Response], dict[str, Any]]:
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as web:
            body = {"prompt": "Hello", "max_new_tokens": 12}
            replies = await asyncio.gather(*(web.post("/generate", json=body) for _ in range(2)))
            replies.append(await web.post("/generate", json={"prompt": ""}))
            return replies, (await web.get("/status")).json()

    replies, status = asyncio.run(talk())
    assert [reply.status_code for reply in replies] == [200, 200, 422]
    for reply in replies[:2]:
        assert reply.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert status["state"] in ({"tuned", "original"} if when == "blocking" else {"observing"})
    assert not hasattr(model, "autotune")


def test_shadow_server(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, candidate = tiny(), tiny(seed=9)
    inputs = tokenizer("Hello", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0, 5:], skip_special_tokens=True)
    server = module(EXAMPLES / "shadow_server.py")
    app = server.create_app(model, tokenizer, {"other": candidate}, share=1.0, store=tmp_path / "store.sqlite")

    async def talk() -> tuple[list[httpx.Response], dict[str, Any]]:
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as web:
            body = {"prompt": "Hello", "max_new_tokens": 8}
            replies = [await web.post("/generate", json=body)]
            assert await asyncio.to_thread(app.state.shadow.wait, 60)
            replies.append(await web.post("/generate", json={"prompt": ""}))
            return replies, (await web.get("/experiment")).json()

    replies, status = asyncio.run(talk())
    assert [reply.status_code for reply in replies] == [200, 422]
    assert replies[0].json() == {"text": expected}
    assert (status["state"], status["requests"], status["counts"]) == ("running", 1, {"sampled": 1})
    assert status["candidates"][0]["counts"] == {"diverged": 1}
