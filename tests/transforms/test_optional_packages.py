"""torchao and bitsandbytes: used where they run, and a sentence where they do not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from autotune.runtime.variant import Variant
from autotune.transforms import bitsandbytes, make, torchao
from tests import models
from tests.transforms.test_contract import COMPILER

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    torchao._missing.cache_clear()
    bitsandbytes._missing.cache_clear()
    yield
    torchao._missing.cache_clear()
    bitsandbytes._missing.cache_clear()


@pytest.mark.fault("A26")
@pytest.mark.parametrize(("name", "module"), [("torchao", "torchao.quantization"), ("bitsandbytes", "bitsandbytes")])
def test_not_installed(name: str, module: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, module, None)
    reason = make(name, {}).unavailable(Variant(llama), COMPILER)
    assert reason is not None
    assert name in reason
    assert "here: " in reason


@pytest.mark.fault("A26")
def test_import_that_fails_with_any_exception(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(bitsandbytes, "library", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reason = make("bitsandbytes", {}).unavailable(Variant(llama), COMPILER)
    assert "libcudart.so" in (reason or "")


def test_bitsandbytes_may_not_download(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "HF_HUB_OFFLINE" in (make("bitsandbytes", {}).unavailable(Variant(llama), COMPILER) or "")


@pytest.mark.slow
def test_torchao_compiled_equals_eager(llama: PreTrainedModel) -> None:
    ids = torch.tensor(models.token_prompts())
    results = []
    for compiled in (False, True):
        transform = make("torchao", {"compile": compiled})
        if (reason := transform.unavailable(Variant(llama), COMPILER)) is not None:
            pytest.skip(reason)
        with torch.no_grad():
            results.append(Variant(llama).with_transform(transform).modules["decode"](ids).logits)
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=1e-3)
