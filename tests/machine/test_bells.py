"""Event loops that other threads wake: everybody who waits is told, and one byte is enough for all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from autotune.machine import bells


def from_a_thread(ring: Callable[[], None]) -> None:
    thread = threading.Thread(target=ring)
    thread.start()
    thread.join()


async def woken(ring: Callable[[bells.Bell, list[asyncio.Event]], None]) -> int:
    """How often a loop was woken until three events were set by a thread."""
    loop, bell = asyncio.get_running_loop(), bells.of_this_loop()
    events = [asyncio.Event() for _ in range(3)]
    wakes, real = [0], loop.call_soon_threadsafe

    def counted(*args: object) -> object:
        wakes[0] += 1
        return real(*args)

    loop.call_soon_threadsafe = counted  # type: ignore[assignment, method-assign]
    from_a_thread(lambda: ring(bell, events))
    async with asyncio.timeout(60):
        for event in events:
            await event.wait()
    return wakes[0]


def one_by_one(bell: bells.Bell, events: list[asyncio.Event]) -> None:
    for event in events:
        bell.ring(event)


def at_once(bell: bells.Bell, events: list[asyncio.Event]) -> None:
    with bells.together():
        one_by_one(bell, events)


def in_spite_of_an_error(bell: bells.Bell, events: list[asyncio.Event]) -> None:
    with suppress(MemoryError), bells.together():
        one_by_one(bell, events)
        raise MemoryError


@pytest.mark.parametrize(("ring", "wakes"), [(one_by_one, 3), (at_once, 1), (in_spite_of_an_error, 1)])
def test_a_loop_is_woken_once_for_all_that_comes_together(
    ring: Callable[[bells.Bell, list[asyncio.Event]], None], wakes: int
) -> None:
    assert asyncio.run(woken(ring)) == wakes


def test_other_threads_do_not_wait_for_those_that_tell_together() -> None:
    async def check() -> None:
        bell, event = bells.of_this_loop(), asyncio.Event()
        with bells.together():
            from_a_thread(lambda: bell.ring(event))
            async with asyncio.timeout(60):
                await event.wait()

    asyncio.run(check())


def test_each_loop_has_its_own_bell_and_a_closed_one_disturbs_nobody() -> None:
    async def mine() -> bells.Bell:
        assert bells.of_this_loop() is bells.of_this_loop()
        return bells.of_this_loop()

    first, second = asyncio.run(mine()), asyncio.run(mine())
    assert first is not second
    first.ring(asyncio.Event())
