"""A plugin of pytest: threads begin late and wake late, at random. It finds tests that count on an order of threads.

    make test-late
    make test-late LATE_SEED=2

On a quiet machine a thread that was started runs at once, and a test that forgets to wait for it passes thousands of
times. Here each thread but the main one waits for up to `LATE_S` with a probability of `LATE_SHARE`, before it runs and
whenever it was woken. What a test says about order must hold all the same; only what it says about time may not.
"""

from __future__ import annotations

import os
import random
import threading
import time

SHARE = float(os.environ.get("LATE_SHARE", "0.2"))
MOST_S = float(os.environ.get("LATE_S", "0.4"))
draw = random.Random(os.environ.get("LATE_SEED", "1"))
start, wait, sleep = threading.Thread.start, threading.Condition.wait, time.sleep  # before a test replaces them


def delay_s() -> float:
    """Seconds for which a thread is late now."""
    return draw.random() * MOST_S if draw.random() < SHARE else 0.0


def start_late(self: threading.Thread) -> None:
    run = self.run

    def run_late() -> None:
        sleep(delay_s())
        run()

    self.run = run_late  # type: ignore[method-assign]
    start(self)


def wait_late(self: threading.Condition, timeout: float | None = None) -> bool:
    """Wait for a notice, and then let others have the lock for a while. Events and queues wait by this, too."""
    found = wait(self, timeout)
    if threading.current_thread() is not threading.main_thread() and (late_s := delay_s()):
        self.release()
        sleep(late_s)
        self.acquire()
    return found


threading.Thread.start = start_late  # type: ignore[method-assign]
threading.Condition.wait = wait_late  # type: ignore[method-assign]
