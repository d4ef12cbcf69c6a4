"""The fake device catches mistakes: each of its rules is broken, and switched off."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.fakes.cuda import FakeCuda
from tests.fakes.rules import RULES, Misuse


class Captured:
    """A graph of y = 2 x + steps, where the host counts the steps."""

    def __init__(self, opaque: bool = False, fake: FakeCuda | None = None) -> None:
        self.fake = fake or FakeCuda(opaque=opaque)
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


def test_a_replay_waits_for_the_end_of_a_capture() -> None:
    """What it queued would be captured, too."""
    captured = Captured()

    def replay() -> None:
        with captured.fake.replaying():
            captured.graph.replay()

    assert during_a_capture(captured.fake, replay) == [None]


def during_a_capture(fake: FakeCuda, act: Callable[[], object]) -> list[BaseException | None]:
    """Capture a graph, during which another thread begins `act`. Returns what that raised, once the capture ended."""
    raised, threads, earlier = list[BaseException | None](), list[threading.Thread](), fake.captures
    begun = threading.Event()

    def attempt() -> None:
        begun.set()
        try:
            act()
            raised.append(None)
        except Misuse as error:
            raised.append(error)

    def work() -> torch.Tensor:
        if fake.captures > earlier:
            threads.append(threading.Thread(target=attempt))
            threads[0].start()
            assert begun.wait(60)
            threads[0].join(timeout=0.2)  # it may wait for the capture's end
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
        total = y.sum()
        if fake.captures:
            total.item()
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


class Wrong(AssertionError):
    """Numbers that are not those that were asked for."""


def need(holds: bool) -> None:
    if not holds:
        raise Wrong


def host_counts(fake: FakeCuda) -> None:
    captured = Captured(fake=fake)
    calls = captured.calls
    captured.replay()
    need(captured.calls > calls)


def frees_a_buffer(fake: FakeCuda) -> None:
    captured = Captured(fake=fake)
    captured.x = torch.ones(4)
    captured.replay()


def resizes_a_buffer(fake: FakeCuda) -> None:
    captured = Captured(fake=fake)
    captured.total.resize_(9)
    captured.replay()


def keeps_a_result(fake: FakeCuda) -> None:
    captured = Captured(fake=fake)
    held = captured.replay()
    before = held.clone()
    captured.x.fill_(7)
    captured.replay()
    need(torch.equal(held, before))


def captures_outside(fake: FakeCuda) -> None:
    fake.capture(lambda: torch.ones(2).mul(2))


def shares_the_stream(fake: FakeCuda) -> None:
    raised = list[BaseException]()

    def enter() -> None:
        try:
            with fake.stream():
                pass
        except Misuse as error:
            raised.append(error)

    with fake.stream():
        other = threading.Thread(target=enter)
        other.start()
        other.join()
    for error in raised:
        raise error


def in_the_stream(fake: FakeCuda, work: Callable[[], object], look: Callable[[], torch.Tensor]) -> list[float]:
    """What the caller sees after `work` was queued into the device's stream, which it does not wait for."""
    before = fake.mark()
    with fake.stream():
        fake.wait(before)
        work()
    return look().tolist()


def reads_a_replay_early(fake: FakeCuda) -> None:
    captured = Captured(fake=fake)
    captured.x.fill_(5)
    need(in_the_stream(fake, captured.graph.replay, lambda: captured.total) == [4 + 5] * 4)


def reads_a_copy_early(fake: FakeCuda) -> None:
    out = torch.zeros(4)
    need(in_the_stream(fake, lambda: out.copy_(torch.ones(4)), lambda: out) == [1] * 4)


def overwrites_an_input_early(fake: FakeCuda) -> None:
    captured, given = Captured(fake=fake), torch.full((4,), 5.0)

    def queue() -> None:
        captured.x.copy_(given)
        captured.graph.replay()

    in_the_stream(fake, queue, lambda: given.fill_(6))  # the stream has not read it yet
    fake.synchronize()
    need(captured.total.tolist() == [4 + 5] * 4)


def overwrites_an_input_between_replays(fake: FakeCuda) -> None:
    captured = Captured(fake=fake)

    def twice() -> None:
        captured.graph.replay()
        torch.add(captured.x, 0, out=captured.x)  # needs what was queued
        captured.graph.replay()

    in_the_stream(fake, twice, lambda: captured.x.fill_(3))
    fake.synchronize()
    need(captured.total.tolist() == [4 + 1 + 1] * 4)


def reads_a_fetched_tensor_early(fake: FakeCuda) -> None:
    fetched: Any = fake.fetch(torch.ones(4))
    need(fetched.host.tolist() == [1] * 4)


def replays_unordered(fake: FakeCuda) -> None:
    captured = Captured(fake=fake)
    with fake.stream():
        captured.graph.replay()


def goes_on_unordered(fake: FakeCuda) -> None:
    captured = Captured(fake=fake)
    in_the_stream(fake, captured.graph.replay, lambda: captured.y)
    fake.fetch(captured.y)


def capturing(act: Callable[[torch.Tensor, FakeCuda], object]) -> Callable[[FakeCuda], None]:
    """Captures what does `act`, as its warm-ups may."""

    def work(fake: FakeCuda) -> None:
        x = torch.ones(4)

        def step() -> torch.Tensor:
            act(x, fake)
            return x * 2

        fake.owner.run(lambda: fake.capture(step))

    return work


def runs_first_in_a_capture(fake: FakeCuda) -> None:
    x = torch.ones(4)
    fake.owner.run(lambda: fake.capture(lambda: x.mul(2).exp() if fake.captures else x.mul(2)))


def captures_without_warm_ups(fake: FakeCuda) -> None:
    x = torch.ones(4)

    def record() -> None:
        fake.record_graph(lambda: x.mul(2), None)

    fake.owner.run(record)


def ends_another_graph(fake: FakeCuda) -> None:
    """Captured with a workspace that is not its own."""
    fake.drop_workspaces = lambda: None  # type: ignore[method-assign]
    captured, other = Captured(fake=fake), Captured(fake=fake)
    del other
    gc.collect()
    captured.replay()


def counts_the_memory_of_graphs(fake: FakeCuda) -> None:
    free, x = fake.memory().free, torch.ones(250)
    graph = fake.owner.run(lambda: fake.capture(lambda: x * 2))
    need(fake.memory().free == free)
    del graph


def fails_a_capture(fake: FakeCuda) -> None:
    free, x = fake.memory().free, torch.ones(250)

    def work() -> torch.Tensor:
        if fake.captures:
            x.mul(2)
            raise ZeroDivisionError
        return x * 2

    with pytest.raises(ZeroDivisionError):
        fake.owner.run(lambda: fake.capture(work))
    gc.collect()
    need(fake.memory().free == free)


def runs_out(fake: FakeCuda) -> None:
    fake.free_bytes, x = 2_500, torch.ones(250)
    fake.owner.run(lambda: fake.capture(lambda: x * 2 * 2 * 2))


BREAKS: list[tuple[str, Callable[[FakeCuda], None]]] = [
    ("operators", host_counts),
    ("buffers", frees_a_buffer),
    ("buffers", resizes_a_buffer),
    ("result", keeps_a_result),
    ("stream", captures_outside),
    ("stream", shares_the_stream),
    ("lazy", reads_a_replay_early),
    ("lazy", reads_a_copy_early),
    ("lazy", overwrites_an_input_early),
    ("lazy", overwrites_an_input_between_replays),
    ("fetch", reads_a_fetched_tensor_early),
    ("before", replays_unordered),
    ("after", goes_on_unordered),
    ("first", runs_first_in_a_capture),
    ("first", captures_without_warm_ups),
    ("synchronize", capturing(lambda x, fake: fake.synchronize())),
    ("synchronize", capturing(lambda x, fake: fake.fetch(x))),
    ("values", capturing(lambda x, fake: bool(x.any()))),
    ("host", capturing(lambda x, fake: x.cpu())),
    ("host", capturing(lambda x, fake: x.to("cpu"))),
    ("host", capturing(lambda x, fake: x.tolist())),
    ("host", capturing(lambda x, fake: x.numpy())),
    ("host", capturing(lambda x, fake: torch.tensor([1.0], device=x.device))),
    ("release", capturing(lambda x, fake: fake.trim())),
    ("workspace", ends_another_graph),
    ("pool", counts_the_memory_of_graphs),
    ("leak", fails_a_capture),
    ("memory", runs_out),
]


@pytest.mark.parametrize(("rule", "work"), BREAKS)
def test_a_broken_rule_is_noticed_by_itself(rule: str, work: Callable[[FakeCuda], None]) -> None:
    with pytest.raises((Misuse, Wrong, torch.OutOfMemoryError)):
        work(FakeCuda())
    work(FakeCuda(without={rule}))  # nothing else notices


def test_every_rule_is_broken() -> None:
    assert {rule for rule, _ in BREAKS} == set(RULES)
