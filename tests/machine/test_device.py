"""The device layer: what a CPU answers, what errors mean, one thread for graphs; and that the fake catches mistakes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune.errors import DeviceError, VariantError
from autotune.machine import device, hardware, processor
from autotune.machine.device import Memory
from autotune.machine.device.cuda import Cuda
from autotune.machine.device.failures import classify
from tests.fakes.cuda import FakeCuda, Misuse


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


def test_a_stand_in_holds_inside_its_block_alone() -> None:
    with device.stand_in(FakeCuda()) as fake:
        assert device.of("cpu") is fake
        assert hardware.probe().device == "cuda"
        assert hardware.probe().capability == "9.0"
    assert device.of("cpu").kind == "cpu"


def test_free_memory_is_what_a_tensor_can_get(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [  # as of torch.cuda.memory_snapshot
        {"device": 1, "segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 700},
        {"device": 1, "segment_pool_id": (0, 0), "total_size": 200, "allocated_size": 0},
        {"device": 1, "segment_pool_id": (0, 3), "total_size": 5000, "allocated_size": 100},  # of a graph
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 9000, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (40, 80))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda **asked: segments)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: 800)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: 900)
    assert Cuda(torch.device("cuda", 1)).memory() == Memory(free=40 + 300 + 200, used=800, peak=900)


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


class Captured:
    """A graph of y = 2 x + steps, where the host counts the steps."""

    def __init__(self, opaque: bool = False) -> None:
        self.fake = FakeCuda(opaque=opaque)
        self.x = torch.ones(4)
        self.total = torch.zeros(4)
        self.calls = 0
        self.graph, self.y = self.fake.owner.run(lambda: self.fake.capture(self.work))

    def work(self) -> torch.Tensor:
        self.calls += 1
        self.total.add_(self.x)
        return self.x.view(2, 2).mul(2).add(self.calls)

    def replay(self) -> torch.Tensor:
        self.fake.owner.run(self.graph.replay)
        return self.y


def test_a_replay_reads_its_buffers_and_freezes_what_the_host_did() -> None:
    captured = Captured()
    frozen = captured.calls
    captured.x.fill_(5)
    assert captured.replay().tolist() == [[10 + frozen] * 2] * 2
    assert captured.calls == frozen, "Python ran again"
    assert captured.total.tolist() == [4 + 5] * 4  # warm-ups and the capture, then one replay


def test_a_replay_overwrites_the_last_result() -> None:
    captured = Captured()
    held = captured.replay()
    before = held.clone()
    captured.x.fill_(7)
    captured.replay()
    assert not torch.equal(held, before)


@pytest.mark.parametrize("opaque", [False, True])
def test_any_thread_may_replay_in_order(opaque: bool) -> None:
    captured = Captured(opaque)
    with captured.fake.replaying():
        captured.graph.replay()
    captured.fake.fetch(captured.y)


@pytest.mark.parametrize("opaque", [False, True])
def test_a_replay_out_of_order_is_noticed(opaque: bool) -> None:
    captured = Captured(opaque)
    fake = captured.fake
    with fake.stream():
        fake.wait(fake.mark())  # of this very stream
        with pytest.raises(Misuse, match="without a wait for what the caller queued before"):
            captured.graph.replay()
    before = fake.mark()
    with fake.stream():
        fake.wait(before)
        early = fake.mark()
        captured.graph.replay()
        after = fake.mark()
    for go_on in (fake.mark, lambda: fake.fetch(captured.y)):
        fake.wait(early)
        with pytest.raises(Misuse, match="without a wait for what was replayed"):
            go_on()
    fake.wait(after)
    fake.fetch(captured.y)


def test_one_thread_at_a_time_is_in_the_stream() -> None:
    fake, raised = FakeCuda(), list[str]()

    def enter() -> None:
        with pytest.raises(Misuse) as error, fake.stream():
            pass
        raised.append(str(error.value))

    with fake.stream(), fake.stream():
        other = threading.Thread(target=enter)
        other.start()
        other.join()
    assert raised == ["two threads queue into the device's stream at once"]
    with fake.stream():
        pass


def test_a_replay_waits_for_the_end_of_a_capture() -> None:
    """What it queued would be captured, too."""
    captured = Captured()

    def replay() -> None:
        with captured.fake.replaying():
            captured.graph.replay()

    assert during_a_capture(captured.fake, replay) == [None]


def test_a_freed_or_resized_buffer_is_noticed() -> None:
    captured = Captured()
    captured.x = torch.ones(4)  # the one that was captured is gone
    with pytest.raises(Misuse, match="freed"):
        captured.replay()
    captured = Captured()
    captured.total.resize_(9)
    with pytest.raises(Misuse, match="resized"):
        captured.replay()


WAITING: list[Callable[[torch.Tensor, FakeCuda], object]] = [
    lambda x, fake: x.sum().item(),
    lambda x, fake: bool(x.any()),
    lambda x, fake: x.nonzero(),
    lambda x, fake: fake.synchronize(),
    lambda x, fake: fake.fetch(x),
    lambda x, fake: fake.trim(),
    lambda x, fake: x.cpu(),
    lambda x, fake: x.to("cpu"),
    lambda x, fake: x.tolist(),
    lambda x, fake: x.numpy(),
    lambda x, fake: torch.tensor([1.0], device=x.device),
]


@pytest.mark.parametrize("wait", WAITING)
def test_nothing_may_wait_or_release_memory_during_a_capture(wait: Callable[[torch.Tensor, FakeCuda], object]) -> None:
    fake, x, calls = FakeCuda(), torch.ones(4), list[int]()

    def work() -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:  # the warm-ups may
            wait(x, fake)
        return x * 2

    with pytest.raises(Misuse, match="captured"):
        fake.owner.run(lambda: fake.capture(work))


def during_a_capture(fake: FakeCuda, act: Callable[[], object]) -> list[BaseException | None]:
    """Capture a graph, during which another thread begins `act`. Returns what that raised, once the capture ended."""
    raised, threads, earlier = list[BaseException | None](), list[threading.Thread](), fake.captures

    def attempt() -> None:
        try:
            act()
            raised.append(None)
        except Misuse as error:
            raised.append(error)

    def work() -> torch.Tensor:
        if fake.captures > earlier:
            threads.append(threading.Thread(target=attempt))
            threads[0].start()
            threads[0].join(timeout=0.2)
        return torch.ones(2).mul(2)

    fake.owner.run(lambda: fake.capture(work))
    threads[0].join()
    return raised


def test_memory_is_released_only_after_a_capture() -> None:
    fake = FakeCuda()
    assert during_a_capture(fake, fake.trim) == [None]
    assert fake.trims == 1
    (error,) = during_a_capture(fake := FakeCuda(), fake.release)
    assert "released while a graph is captured" in str(error)
    assert fake.trims == 0


def test_what_only_looks_like_a_copy_is_captured() -> None:
    fake, x = FakeCuda(), torch.ones(4)
    fake.owner.run(lambda: fake.capture(lambda: x.to(x.device).to(torch.float16).to(device=x.device)))


def test_a_graphs_memory_is_taken_until_its_pool_ends() -> None:
    fake, x = FakeCuda(free_bytes=10_000), torch.ones(250)  # 1000 bytes
    pools = [fake.pool()]
    graphs = [fake.owner.run(lambda: fake.capture(lambda: x * 2, pools[0])) for _ in range(3)]
    assert fake.memory().free == 9_000, "graphs of one pool share its memory"
    pools.clear()
    gc.collect()
    assert fake.memory().free == 9_000
    graphs.clear()
    gc.collect()
    assert (fake.memory().free, fake.lost_bytes) == (10_000, 0)


def test_a_failed_capture_keeps_its_memory() -> None:
    fake, x = FakeCuda(free_bytes=10_000), torch.ones(250)

    def work() -> torch.Tensor:
        y = x * 2
        if fake.captures:
            y.sum().item()
        return y

    with pytest.raises(Misuse, match="waits for the device"):
        fake.owner.run(lambda: fake.capture(work))
    gc.collect()
    assert (fake.memory().free, fake.lost_bytes) == (9_000 - 4, 1_000 + 4)  # the sum takes 4


def test_a_capture_may_run_out_of_memory() -> None:
    fake, x = FakeCuda(free_bytes=2_500), torch.ones(250)
    with pytest.raises(torch.OutOfMemoryError) as error:
        fake.owner.run(lambda: fake.capture(lambda: x * 2 * 2 * 2))
    assert fake.failure(error.value) == "memory"


def attend(dtype: torch.dtype, mask: bool) -> torch.Tensor:
    q, seen = torch.ones(1, 2, 4, 8, dtype=dtype), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=seen if mask else None)


def multiply(rows: int) -> torch.Tensor:
    return torch._int_mm(torch.ones(rows, 32, dtype=torch.int8), torch.ones(32, 16, dtype=torch.int8))


KERNELS: list[tuple[Callable[[], torch.Tensor], str | None]] = [
    (lambda: attend(torch.bfloat16, mask=False), None),
    (lambda: attend(torch.bfloat16, mask=True), "No available kernel"),
    (lambda: attend(torch.float32, mask=False), "No available kernel"),
    (lambda: multiply(17), None),
    (lambda: multiply(16), "needs to be greater than 16, but got 16"),
]


@pytest.mark.parametrize(("work", "refusal"), KERNELS)
def test_operators_are_refused_as_by_a_gpus_kernels(work: Callable[[], torch.Tensor], refusal: str | None) -> None:
    fake = FakeCuda()
    work()  # a CPU takes all of it
    for attempt in (lambda: fake.owner.run(work), lambda: fake.owner.run(lambda: fake.capture(work))):
        with pytest.raises(RuntimeError, match=refusal) if refusal else nullcontext():
            attempt()


def test_capture_and_replay_belong_inside_the_stream() -> None:
    fake = FakeCuda()
    with pytest.raises(Misuse, match="outside the device's stream"):
        fake.capture(lambda: torch.ones(1))
