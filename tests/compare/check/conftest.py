"""A tiny model, and one baseline of it that no test writes to."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from autotune.compare import check
from autotune.validate.tiers import SIZES, Size
from autotune.validate.timing import Disturbance
from tests.models import tiny, token_prompts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

CONTEXT = {"max_position_embeddings": 512, "initializer_range": 0.15}  # room for the long texts; not too sure of itself


def subject(**changes: object) -> PreTrainedModel:
    return tiny("llama", **(CONTEXT | changes))


@contextmanager
def short_exam() -> Iterator[None]:
    """Quick as a test has to be: a third of the tokens of the real size, as many prompts, undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "quick", Size(16, natural=6, own=6, padded=6, lengths=(64,)))
        patch.setattr(Disturbance, "since", lambda self: "")  # what else this machine does is not the tests' matter
        yield


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    with short_exam():
        yield


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are far too small for more
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A recorded baseline, without latency."""
    out = tmp_path_factory.mktemp("check") / "baseline"
    with short_exam():
        check.record(subject(), out, prompts=token_prompts(18, 40), latency=False)
    return out


@pytest.fixture(scope="session")
def baseline(folder: Path) -> check.Baseline:
    return check.load(folder)


@pytest.fixture
def model() -> PreTrainedModel:
    """The recorded model anew, of this test's own."""
    return subject()
