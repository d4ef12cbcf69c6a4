"""Another number of threads, only while a phase runs."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from autotune.diagnose.costs import MemoryUse, PhaseProfile, Profile
from autotune.machine import intraop
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.attention import Attention
from autotune.transforms.threads import Threads, usable_cores
from tests.transforms.test_contract import COMPILER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_holds_while_the_phase_runs(llama: PreTrainedModel) -> None:
    transform = Threads("decode", 1)
    candidate = Variant(llama).with_transform(transform)
    with candidate.running("decode"):
        assert torch.get_num_threads() == 1
    with candidate.running("prefill"):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2
    assert transform.took_effect(candidate) is None
    assert transform.took_effect(Variant(llama)) == "decode runs on 2 threads instead of 1"


def test_other_threads_compute_with_their_own_number(llama: PreTrainedModel) -> None:
    """One that was there before, and one that starts meanwhile."""

    def numbers() -> tuple[int, int]:
        return torch.get_num_threads(), mkl_threads()

    candidate = Variant(llama).with_transform(Threads("decode", 1))
    with ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1) as meanwhile:
        own, others = numbers(), before.submit(numbers).result()
        with candidate.running("decode"):
            assert numbers() == (1, 1)
            assert before.submit(numbers).result() == others
            assert meanwhile.submit(numbers).result() == others
        assert numbers() == own
        assert meanwhile.submit(numbers).result() == others


def mkl_threads() -> int:
    """What MKL's multiplications of the calling thread compute with; torch's number where there is no MKL."""
    (path,) = (Path(torch.__file__).parent / "lib").glob("*torch_cpu.*")
    ask = getattr(ctypes.CDLL(str(path)), "MKL_Get_Max_Threads", torch.get_num_threads)
    return int(ask())


def test_where_threads_cannot_be_set_apart(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intraop, "_setters", tuple)
    assert "no way to set the threads of one call" in (Threads("both", 1).unavailable(Variant(llama), COMPILER) or "")
    with intraop.computing_with(1):
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("count", "device", "says"),
    [
        (2, "cpu", "on 2 threads is what runs already"),
        (usable_cores() + 1, "cpu", "would wait for one another"),
        (1, "cuda", "this model runs on cuda"),
        (1, "cpu", None),
    ],
)
def test_unavailable(count: int, device: str, says: str | None, llama: PreTrainedModel) -> None:
    reason = Threads("both", count).unavailable(Variant(llama), replace(COMPILER, device=device))
    assert reason is None if says is None else says in (reason or "")


@pytest.mark.parametrize(
    ("count", "matmuls", "bytes_per_s", "core_bytes_per_s", "speedup"),
    [
        (4, 500, 2e11, 1e9, 2.0),  # twice as many threads
        (1, 500, 2e11, nan, 0.0200 / 0.0185),  # 500 parallel regions of 3 us spared out of 20 ms
        (1, 5000, 2e11, nan, 2.0),  # never more than half
        (1, 500, 2e11, 1e11, 0.0200 / 0.0185),  # one core reads as fast as the matmuls do
        (1, 500, 2e11, 1e10, 0.0200 / (0.0185 + 0.040)),  # 500 MB by one core take 50 ms; the matmuls take 10 now
        (1, 500, 2e10, 1e10, 0.0200 / 0.0185),  # they read 50 GB/s, so it is caches that they read
    ],
)
def test_prediction(count: int, matmuls: int, bytes_per_s: float, core_bytes_per_s: float, speedup: float) -> None:
    decode = PhaseProfile("decode", (0.020,), 1e9, 5e8, 0, 0.9, "float32", 0.01, 0, 9, 0, (), matmul_count=matmuls)
    profile = Profile({"decode": decode}, (), (), MemoryUse(0, 0, 0), 1, 1)
    hardware = replace(
        COMPILER,
        threads=2,
        core_bytes_per_s=core_bytes_per_s,
        bandwidth_bytes_per_s=bytes_per_s,
        flops_per_s={"float32": 1e12},
    )
    assert Threads("decode", count).predict(profile, hardware) == pytest.approx({"decode": speedup})


def test_a_second_count_replaces_the_first(llama: PreTrainedModel) -> None:
    candidate = Variant(llama).with_transform(Threads("both", 1))
    assert "already" in (Threads("both", 1).unavailable(candidate, COMPILER) or "")
    assert candidate.with_transform(Threads("prefill", 2)).threads == {"prefill": 2, "decode": 1}
    assert candidate.threads == {"prefill": 1, "decode": 1}


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        (Threads("decode", 2), Threads("decode", 1), ["threads(count=1)@decode"]),
        (Threads("decode", 2), Threads("both", 1), ["threads(count=1)@both"]),
        (Threads("both", 2), Threads("decode", 1), ["threads(count=2)@both", "threads(count=1)@decode"]),
        (Threads("prefill", 2), Threads("decode", 1), ["threads(count=2)@prefill", "threads(count=1)@decode"]),
        (
            Attention("prefill", "eager"),
            Attention("prefill", "sdpa:math"),
            ["attention(implementation=sdpa:math)@prefill"],
        ),
        (Threads("prefill", 1), Attention("prefill", "eager"), None),
    ],
    ids=str,
)
def test_a_plan_names_nothing_that_was_replaced(
    llama: PreTrainedModel, first: Transform, second: Transform, left: list[str] | None
) -> None:
    found = Variant(llama).with_transform(first).with_transform(second).transforms
    assert sorted(map(str, found)) == sorted(left or [str(first), str(second)])
