"""The device layer: what a CPU answers, what errors mean, one thread for graphs."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from autotune.errors import DeviceError, VariantError
from autotune.machine import device, hardware, processor
from autotune.machine.device import Memory
from autotune.machine.device.cuda import Cuda
from autotune.machine.device.failures import classify
from tests.fakes.cuda import FakeCuda


def test_a_cpu_is_one_device_and_answers() -> None:
    cpu = device.of("cpu")
    assert device.of(torch.device("cpu")) is cpu
    assert cpu.identity().memory_bytes == processor.memory_bytes()
    assert 0 < cpu.memory().free <= processor.memory_bytes()
    assert 0 < cpu.memory().used <= cpu.memory().peak
    assert cpu.seconds(lambda: torch.ones(8)) > 0
    tensor = torch.ones(3)
    assert cpu.fetch(tensor)() is tensor
    assert "no graphs" in (cpu.without_graphs() or "")
    with pytest.raises(DeviceError, match="no graphs"):
        cpu.capture(lambda: tensor)


TWO = {"memory.max": "100000", "memory.current": "70000", "memory.stat": "anon 50000\ninactive_file 15000\n"}
ONE = {
    "memory/memory.limit_in_bytes": "100000",
    "memory/memory.usage_in_bytes": "70000",
    "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 15000\n",
}


@pytest.mark.parametrize(
    ("files", "limit", "left"),
    [
        (TWO, 100_000, 45_000),
        (ONE, 100_000, 45_000),
        (TWO | {"memory.stat": ""}, 100_000, 30_000),
        (TWO | {"memory.current": "130000"}, 100_000, 0),
        (TWO | {"memory.max": "max"}, None, None),
        (ONE | {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, None, None),
        ({}, None, None),
    ],
)
def test_a_containers_memory_is_what_its_limit_leaves(
    files: dict[str, str], limit: int | None, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = device.of("cpu").memory().free
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(processor, "CONTROL_GROUPS", tmp_path)
    assert processor.memory_left() == left
    if limit is not None and left is not None:
        assert (processor.memory_bytes(), device.of("cpu").memory().free) == (limit, left)
    else:
        assert device.of("cpu").memory().free > whole / 2


def test_a_stand_in_holds_inside_its_block_alone() -> None:
    with device.stand_in(FakeCuda()) as fake:
        assert device.of("cpu") is fake
        assert hardware.probe().device == "cuda"
        assert hardware.probe().capability == "9.0"
    assert device.of("cpu").kind == "cpu"


@pytest.mark.parametrize(
    ("fraction", "backend", "free"),
    [
        (1.0, "native", 40 + 300 + 200),
        (0.61, "native", 20 + 300 + 200),  # of what the process may take, 1200 of 1220 are taken
        (0.5, "native", 300 + 200),
        (1.0, "cudaMallocAsync", 40 + 400),  # which shows no segments
    ],
)
def test_free_memory_is_what_a_tensor_can_get(
    monkeypatch: pytest.MonkeyPatch, fraction: float, backend: str, free: int
) -> None:
    segments = [  # as of torch.cuda.memory_snapshot
        {"device": 1, "segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 700},
        {"device": 1, "segment_pool_id": (0, 0), "total_size": 200, "allocated_size": 0},
        {"device": 1, "segment_pool_id": (0, 3), "total_size": 5000, "allocated_size": 100},  # of a graph
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 9000, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (40, 2000))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda **asked: segments)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda where: 1200)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: 800)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: 900)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda where: fraction)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    assert Cuda(torch.device("cuda", 1)).memory() == Memory(free=free, used=800, peak=900)


@pytest.mark.gpu
def test_idle_memory_of_a_graph_is_not_free() -> None:
    cuda = device.of("cuda")
    cuda.trim()
    before = cuda.memory().free

    def work() -> torch.Tensor:
        return torch.ones(2**26, device="cuda").cumsum(0)[:1].clone()  # 256 MiB in between

    graph, _ = cuda.owner.run(lambda: cuda.capture(work))
    cuda.trim()
    assert cuda.memory().free < before - 2**28
    del graph


ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
    (MemoryError(), "memory"),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "memory"),  # of mmap, for slots
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None),
    (RuntimeError("the program found not enough memory"), "memory"),
    (RuntimeError("std::bad_alloc"), "memory"),
    (
        RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1131'),
        "memory",
    ),
    (torch.AcceleratorError("CUDA error: device-side assert triggered"), "dead"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), "dead"),
    (RuntimeError("CUDA error: unspecified launch failure"), "dead"),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "dead"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x3 and 4x4)"), None),
    (ValueError("an illegal memory access is what this message is about"), None),
]


@pytest.mark.parametrize(("error", "kind"), ERRORS, ids=str)
def test_what_an_error_says(error: Exception, kind: str | None) -> None:
    assert classify(error) == kind
    with pytest.raises(VariantError) as wrapped:
        raise VariantError("decode failed") from error
    assert classify(wrapped.value) == kind, "wrapping hid the cause"


@pytest.mark.fault("A22")
def test_a_dead_device_says_so_once_and_for_all() -> None:
    fake = FakeCuda()
    fake.check()
    first = fake.mark_dead(RuntimeError("CUDA error: device-side assert triggered\nmore"))
    assert "restart the process" in str(first)
    assert str(fake.mark_dead(RuntimeError("another"))) == str(first)
    with pytest.raises(DeviceError, match="device-side assert triggered"):
        fake.check()
    with pytest.raises(DeviceError, match="restart the process"):
        fake.owner.run(lambda: 1)


def test_the_owner_is_one_thread_and_hands_back_what_happens() -> None:
    owner = FakeCuda().owner
    seen = {owner.run(threading.get_ident) for _ in range(3)}
    assert len(seen) == 1
    assert threading.get_ident() not in seen
    assert owner.run(lambda: owner.run(threading.get_ident)) in seen, "nested work waits for itself"
    with pytest.raises(ZeroDivisionError):
        owner.run(lambda: 1 // 0)
    assert owner.run(lambda: 2) == 2, "an exception ended the thread"


def test_many_threads_share_the_owner() -> None:
    owner, results, total = FakeCuda().owner, list[int](), torch.zeros(1)

    def call() -> None:
        for _ in range(50):
            results.append(owner.run(lambda: int(total.add_(1))))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(1, 401)), "two pieces of work overlapped"
